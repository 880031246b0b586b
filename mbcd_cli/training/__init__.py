"""Training: one optimisation step of whatever method, the loop around it, the weight average, and resuming."""
