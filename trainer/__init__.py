"""What keeps a long run honest."""
