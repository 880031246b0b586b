"""A run measured, new clips predicted, runs compared."""
