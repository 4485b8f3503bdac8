"""Pairs in Ollama: created, attached to models that are there, looked at."""
