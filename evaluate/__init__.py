"""evaluate/: scores beside their controls; the papers' claims; three benchmarks."""
