"""From a user's rows and images to packed batches. Never imports megatron."""
