"""Turns language models of every usual layout into packed BinaryMoS checkpoints."""
