"""What is proposed to the target, and how much of it."""
