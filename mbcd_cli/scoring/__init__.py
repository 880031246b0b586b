"""Predictions, metrics and sets of clips: what training, evaluation and landscape all need."""
