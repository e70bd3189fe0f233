"""The `ferrolora` command."""
