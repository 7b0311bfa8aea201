"""megavlm: a Megatron-Core based trainer for vision-language models."""

__version__ = "0.1.0"
