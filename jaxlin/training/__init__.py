"""Training of full and linearized models by the same code."""
