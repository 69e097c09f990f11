"""How long tests wait for other processes."""

PATIENCE = 300  # seconds; what has not ended by then hangs, on however busy a machine
