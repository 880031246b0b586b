"""Training: the objective, one optimisation step, the loop around it, and checkpoints."""
