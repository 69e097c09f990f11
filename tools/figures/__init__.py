"""Figures of a record of `fastvae bench`, on a page with its tables: `python -m tools.figures RECORD [--out DIR]`."""
