"""Hand-tuned forms of attention."""
