// Counts what llama.cpp asks of its devices, put before libggml-base by LD_PRELOAD: graphs computed (one for each part of
// a graph that runs on one device), waits for a device, and tensors read, written and copied between devices.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

enum { COMPUTED, WAITED, READ, WRITTEN, COPIED, KINDS };

long gpu_kit_counts[KINDS];

// Not RTLD_NEXT: where Python loads llama.cpp, libggml-base is not in the scope that is searched then.
static void * original(const char * name) {
    static void * base;
    if (!base && !(base = dlopen("libggml-base.so", RTLD_NOLOAD | RTLD_LAZY)) &&
        !(base = dlopen("libggml-base.so.0", RTLD_NOLOAD | RTLD_LAZY))) {
        fprintf(stderr, "counts: libggml-base.so is not loaded\n");
        abort();
    }
    void * found = dlsym(base, name);
    if (!found) {
        fprintf(stderr, "counts: libggml-base.so has no %s\n", name);
        abort();
    }
    return found;
}

#define COUNTED(kind, result, name, parameters, arguments)     \
    result name parameters {                                   \
        static result (*function) parameters;                  \
        if (!function) {                                       \
            function = (result (*) parameters) original(#name); \
        }                                                      \
        gpu_kit_counts[kind]++;                                \
        return function arguments;                             \
    }

COUNTED(COMPUTED, int,  ggml_backend_graph_compute_async, (void * b, void * g), (b, g))
COUNTED(WAITED,   void, ggml_backend_synchronize, (void * b), (b))
COUNTED(READ,     void, ggml_backend_tensor_get, (void * t, void * d, size_t o, size_t n), (t, d, o, n))
COUNTED(READ,     void, ggml_backend_tensor_get_async, (void * b, void * t, void * d, size_t o, size_t n), (b, t, d, o, n))
COUNTED(WRITTEN,  void, ggml_backend_tensor_set, (void * t, void * d, size_t o, size_t n), (t, d, o, n))
COUNTED(WRITTEN,  void, ggml_backend_tensor_set_async, (void * b, void * t, void * d, size_t o, size_t n), (b, t, d, o, n))
COUNTED(COPIED,   void, ggml_backend_tensor_copy_async, (void * a, void * b, void * s, void * d), (a, b, s, d))
COUNTED(COPIED,   void, ggml_backend_tensor_copy, (void * s, void * d), (s, d))
