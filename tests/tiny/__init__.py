"""Transformers models of a few thousand random parameters, built from configurations."""
