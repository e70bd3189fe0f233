"""One kernel a file; `registry` is the table."""
