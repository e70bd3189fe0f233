"""Adapters: one file a method, one row a method in `registry.py`. Nothing here knows how a base weight is stored."""
