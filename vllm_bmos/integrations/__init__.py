"""Other libraries that load packed checkpoints."""
