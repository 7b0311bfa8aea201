"""How good a model is, asked through transformers or from its answers."""
