"""`python -m ferrolora`: the same as the command `ferrolora`."""

from ferrolora.cli.__main__ import main

main()
