"""`ferrolora export`: what we write, in the form another program wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ferrolora.cli.models import check_choice
from ferrolora.io.checkpoint import require_free


def command(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="adapter: LoRA with its scaling in B. bitsandbytes: a checkpoint.")
    ],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory of the adapter or checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DST holds.")] = False,
) -> None:
    """Write an adapter for programs that know only alpha / rank, or a quantized checkpoint for bitsandbytes.

    Rank-stabilised scaling and alphas that differ from layer to layer go into B, so that alpha / rank of the new
    adapter is right everywhere. llama.cpp's convert_lora_to_gguf.py reads the result. The bytes of a checkpoint are
    bitsandbytes' already: its copy has another label in config.json.
    """
    check_choice("KIND", kind, ("adapter", "bitsandbytes"))
    if kind == "bitsandbytes":
        from ferrolora.io.bitsandbytes import export_checkpoint

        export_checkpoint(source, destination, overwrite)
        print(f"{destination}: labelled for bitsandbytes")
        return
    from ferrolora.io.export_adapter import export_adapter

    require_free(destination, overwrite, source)
    count = export_adapter(source, destination)
    print(f"{destination}: {count} matrices scaled")
