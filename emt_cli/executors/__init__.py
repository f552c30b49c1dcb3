"""Executors start the workers of a run."""
