"""Compiled engines that execute the network."""
