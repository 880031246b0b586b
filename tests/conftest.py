"""Its being here puts this folder on the import path: `from helpers import ...` works in every test."""
