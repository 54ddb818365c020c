"""What is tuned: Model in, Tunable out."""
