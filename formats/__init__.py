"""Other people's files: read, checked, written."""
