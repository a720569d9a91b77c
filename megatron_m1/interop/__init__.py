"""The published formats of other software, read and written."""
