"""From datums to log-probabilities and back to gradients."""
