"""Generation with log-probabilities."""
