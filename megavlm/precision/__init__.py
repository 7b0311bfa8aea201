"""Numbers of few bits: FP8 formats, their scales, and linear layers whose operands are rounded to them."""
