"""Checkpoints of a run: their files, saving and loading in any layout, and their weights as tensors."""
