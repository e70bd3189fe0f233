"""A picture of how a run went."""

from __future__ import annotations

from pathlib import Path

from ferrolora.train.loop import TrainResult


def plot_loss(result: TrainResult, file: Path, title: str) -> None:
    """Draw training and evaluation loss over the optimizer steps into a PNG.

    Args:
        result: a finished run.
        file: the PNG to write.
        title: one line over the plot.
    """
    # Figure alone, not pyplot: no global backend is chosen and no display is needed.
    from matplotlib.figure import Figure

    steps, losses = result.losses()
    evaluations = [entry for entry in result.history if "eval_loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, label="training loss", linewidth=1.2)
    if evaluations:
        axes.plot(
            [entry["step"] for entry in evaluations],
            [entry["eval_loss"] for entry in evaluations],
            label="evaluation loss",
            marker="o",
        )
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
