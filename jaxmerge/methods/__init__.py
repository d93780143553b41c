"""The merge methods, one file per family."""
