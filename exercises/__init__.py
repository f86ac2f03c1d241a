"""exercises: twelve functions to write, each checked against the project's own (README.md)."""
