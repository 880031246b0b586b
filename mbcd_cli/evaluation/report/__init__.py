"""Figures as tables, plots, text, HTML and files; runs compared."""
