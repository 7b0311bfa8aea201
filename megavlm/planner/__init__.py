"""What a layout costs: FLOPs, memory, and the search for the best one. Never imports megatron."""
