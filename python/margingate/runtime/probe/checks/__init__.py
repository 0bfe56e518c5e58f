"""Checks before the first request: of the model as it was loaded, and of whole forwards."""
