"""Answers from a model: greedy decoding on the training layout. Sampling engines come with the methods that sample."""
