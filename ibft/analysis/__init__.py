"""What fine-tuning did to a model: what it knows by heart, and where it keeps it."""
