"""Hugging Face: the model file that travels with exported weights, export of runs, import of folders."""
