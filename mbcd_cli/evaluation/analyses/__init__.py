"""What is measured beyond accuracy."""
