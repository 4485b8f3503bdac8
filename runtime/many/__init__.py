"""Many prompts at once: `create_completions` and `create_chat_completions`."""
