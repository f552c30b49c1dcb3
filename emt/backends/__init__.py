"""Backends that execute a network and its VAE for the pipeline."""
