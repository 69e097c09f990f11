"""Data sets: what one is, where its files are, how they are read; and how any file is written."""
