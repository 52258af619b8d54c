"""Measurements against named baselines, taken side by side in one run."""
