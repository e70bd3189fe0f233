"""`ferrolora quantize`: a model directory to one in 4 or 8 bits, tensor by tensor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ferrolora.cli.console import megabytes, model_errors, print_json, print_table, progress, quiet_transformers
from ferrolora.cli.models import require_directory
from ferrolora.errors import UnsupportedError
from ferrolora.io.quantize_checkpoint import QuantizeSummary
from ferrolora.spec import QuantSpec


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Model directory: config.json and safetensors.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    quant: Annotated[str, typer.Option(help="nf4, fp4 or int8.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale (4-bit types).")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales as well (4-bit types).")] = True,
    skip: Annotated[list[str] | None, typer.Option(help="Module to leave in float; may be repeated.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Measure the error of each weight.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DST holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
) -> None:
    """Quantize the linear layers of a model directory.

    Memory is one tensor, not one model. Run again after an interrupt, it goes on where it stopped. The result loads
    by from_pretrained (import ferrolora first). Heads, embeddings and norms stay as they are.
    """
    spec = _spec(quant, block_size, double_quant)
    require_directory(source)
    quiet_transformers()
    from ferrolora.integrations.checkpoint_names import linear_tensors
    from ferrolora.integrations.transformers import FerroloraConfig
    from ferrolora.io.quantize_checkpoint import quantize_checkpoint

    with model_errors(str(source)):
        tensors = linear_tensors(source, skip or [])
    with progress("quantize", in_bytes=True) as update:
        summary = quantize_checkpoint(
            source,
            destination,
            tensors.weights,
            spec,
            FerroloraConfig.from_spec(spec, skip).to_dict(),
            transposed=tensors.transposed,
            measure=report,
            overwrite=overwrite,
            progress=lambda name, done, total: update(done, total, name),
        )
    if as_json:
        print_json({"destination": str(destination), "spec": asdict(spec), "fused": tensors.fused, **asdict(summary)})
    else:
        _print(summary, destination, len(tensors.fused))


def _spec(quant: str, block_size: int, double_quant: bool) -> QuantSpec:
    try:
        return QuantSpec(quant, block_size, double_quant)
    except UnsupportedError as error:
        raise typer.BadParameter(str(error)) from error


def _print(summary: QuantizeSummary, destination: Path, fused: int) -> None:
    if summary.reports:
        rows = [
            (
                report.name,
                "x".join(map(str, report.shape)),
                f"{8 * report.bytes_after / (report.shape[0] * report.shape[1]):.2f}",
                f"{report.relative_error:.4f}",
                f"{report.max_error:.2e}",
            )
            for report in summary.reports
        ]
        print_table(rows, ("weight", "shape", "bits", "relative error", "max error"))
    print(f"{destination}: {summary.quantized} linear weights quantized")
    print(f"size  {megabytes(summary.bytes_before)} -> {megabytes(summary.bytes_after)}")
    if summary.resumed:
        print(f"resumed after {summary.resumed} complete shards (no error report for those)")
    if fused:
        print(f"left in float: {fused} weights that the model merges with others as it loads")
