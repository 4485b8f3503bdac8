"""The commands that make GGUF files and look at them."""
