"""Where a training ended: loss surfaces, flatness, curvature and paths around checkpoints."""
