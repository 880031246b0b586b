"""What the paper says: its published figures, its tables, its datasets' domains."""
