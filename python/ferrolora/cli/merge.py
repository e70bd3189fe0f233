"""`ferrolora merge`: a model directory and an adapter to one merged model, shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ferrolora.cli.console import model_errors, print_json, print_table, progress, quiet_transformers
from ferrolora.cli.models import check_choice, require_directory
from ferrolora.spec import QUANT_TYPES, QuantSpec

_DTYPES = ("keep", "float32", "bfloat16", "float16")


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of the model, best the unquantized one.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of the adapter.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help="keep, float32, bfloat16 or float16.")] = "keep",
    quant: Annotated[str, typer.Option(help="none, nf4, fp4 or int8: quantize what was merged.")] = "none",
    min_retained: Annotated[
        float, typer.Option(help="Smallest mean share of the adapter that may survive quantization.")
    ] = 0.8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DST holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
) -> None:
    """Put an adapter into the weights of a model.

    Memory is one layer and the adapter. A quantized model is decoded: the result is the float model that training
    saw. With --quant the merged weights are rounded, and the share of the adapter that survived is printed for every
    layer; from an unquantized model that is most of it.
    """
    check_choice("--dtype", dtype, _DTYPES)
    check_choice("--quant", quant, ("none", *QUANT_TYPES))
    require_directory(model)
    require_directory(adapter)
    quiet_transformers()
    from ferrolora.integrations.merge_plan import merge_plan
    from ferrolora.io.merge_checkpoint import merge_checkpoint

    with model_errors(str(model)):
        plan = merge_plan(model, None if quant == "none" else QuantSpec(quant), dtype, min_retained)
    with progress("merge", in_bytes=True) as update:
        summary = merge_checkpoint(
            model,
            adapter,
            destination,
            plan,
            overwrite=overwrite,
            progress=lambda name, done, total: update(done, total, name),
        )
    if as_json:
        print_json({"destination": str(destination), "merged": summary.merged, "retained": summary.retained})
        return
    if summary.retained:
        print_table([(name, f"{share:.1%}") for name, share in summary.retained.items()], ("weight", "retained"))
    print(f"{destination}: {len(summary.merged)} tensors merged")
