"""One op a file."""
