"""Weights in and out: Hugging Face directories, and layout-independent native checkpoints."""
