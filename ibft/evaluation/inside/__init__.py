"""What runs inside the sandbox, under `python -I -S`: scripts that import nothing of the project but one another."""
