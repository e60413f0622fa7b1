"""Data that ships with the package, and data sets made from it; needs NumPy and Pillow only."""
