"""Adapters in a whole model: which modules they go into, which are active, what is saved, what a merge gives."""
