"""Filling a cache: listing, plan, trunk, filler, check."""
