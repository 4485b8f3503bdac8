# Included at the end of llama-cpp-python's CMakeLists.txt: llama-server, llama-quantize and ggml-rpc-server of the same
# tree, beside libllama in the package. The other tools stay unbuilt, they would double the build time.
# llama.cpp installs llama-server by a rule of its own; the same folder keeps a second copy out of the wheel.
set(CMAKE_INSTALL_BINDIR llama_cpp/lib)
set(PROJECT_SOURCE_DIR ${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp)
foreach(tool quantize rpc ui server)
    add_subdirectory(vendor/llama.cpp/tools/${tool})
endforeach()
foreach(target ${GGML_AVAILABLE_BACKENDS} llama-common llama-quantize-impl llama-quantize llama-server-impl llama-server
        ggml-rpc-server)
    llama_cpp_python_install_target(${target})
endforeach()

# Links to a versioned name become copies in a wheel: here each library has one name, and is there once.
# With GGML_CPU_ALL_VARIANTS there is one of ggml-cpu for each kind of CPU; GGML_AVAILABLE_BACKENDS names them all.
foreach(target llama llama-common mtmd ggml ggml-base ${GGML_AVAILABLE_BACKENDS})
    if(TARGET ${target})
        set_property(TARGET ${target} PROPERTY VERSION)
        set_property(TARGET ${target} PROPERTY SOVERSION)
    endif()
endforeach()
