"""Merging a model submodule by submodule."""
