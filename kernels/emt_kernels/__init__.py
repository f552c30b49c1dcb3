"""GPU kernels of `emt`, each with its PyTorch reference."""
