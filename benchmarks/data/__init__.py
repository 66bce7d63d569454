"""How fast training data are made ready, and in how much memory."""
