"""Small helpers that import nothing else of this package."""
