"""How a comparison is measured: the gate, turns, peaks, rows."""
