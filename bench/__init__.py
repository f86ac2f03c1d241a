"""bench/: every speed table, with its baselines."""
