"""Text in, deterministic batches of few shapes out."""
