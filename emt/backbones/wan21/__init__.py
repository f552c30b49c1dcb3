"""Wan 2.1 (Team Wan 2025, arXiv 2503.20314), a diffusion transformer, with the motion of a reference."""
