"""Rendered clips with known motion, to train on and to measure with."""
