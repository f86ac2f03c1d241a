"""What generate.py can do besides its basic loop: one file an idea."""
