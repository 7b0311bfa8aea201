"""Adapters: what is learned beside a model's own weights."""
