"""What a pair costs and what MTP brings on this machine."""
