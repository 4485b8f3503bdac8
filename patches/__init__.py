"""The series over the llama.cpp inside llama-cpp-python, and the script that builds it."""
