"""Losses: pure functions that return (sum, count, metrics). Never import megatron; groups are arguments."""
