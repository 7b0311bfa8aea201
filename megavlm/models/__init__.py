"""Vision towers, projectors and language models on Megatron-Core, one file a family."""
