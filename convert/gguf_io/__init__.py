"""GGUF files: their types, headers read and checked, and written."""
