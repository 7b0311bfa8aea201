"""Recipes: frozen dataclasses, read from YAML and dotted overrides. Imports neither torch nor megatron."""
