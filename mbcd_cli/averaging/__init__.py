"""Averages of weights after the fact: of the epochs of a finished run, of several runs, and what each is worth."""
