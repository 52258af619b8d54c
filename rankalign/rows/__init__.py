"""Prompts and answers to log-probabilities and rewards, and back."""
