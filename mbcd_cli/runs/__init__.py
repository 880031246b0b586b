"""What a command leaves for the next: run folders, checkpoints, logs, names, and opening them again."""
