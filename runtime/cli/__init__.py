"""The command gemma-mtp, and the commands that run a pair."""
