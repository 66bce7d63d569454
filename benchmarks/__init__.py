"""Speed and memory, ours against every peer: `pytest benchmarks/`."""
