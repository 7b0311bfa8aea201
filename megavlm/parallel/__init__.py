"""Ranks, process groups, and what context parallelism does to a packed row."""
