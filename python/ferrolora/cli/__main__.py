"""Entry point of `ferrolora` and `python -m ferrolora`."""

from __future__ import annotations

import sys

NEEDED = {"typer", "rich", "tomli"}


def main() -> None:
    """Run the command line on `sys.argv`; ends the process with its exit status."""
    try:
        from ferrolora.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(f"ferrolora: the command line needs {error.name}: pip install 'ferrolora[cli]'", file=sys.stderr)
        sys.exit(1)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
