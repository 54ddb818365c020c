"""Empirical neural tangent kernels of a Tunable."""
