"""Ferrolora in other libraries, by their public hooks."""
