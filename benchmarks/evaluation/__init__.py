"""How fast samples are judged."""
