"""Training: the rendered world that supplies exact pairs, the datasets, the teacher and the trainer."""
