"""Sweeps: the grid of runs behind a table, planned, run, resumed and collected."""
