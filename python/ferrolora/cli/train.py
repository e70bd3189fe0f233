"""`ferrolora train`: QLoRA from a data file to an adapter, a log and a loss curve."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ferrolora.cli.console import megabytes, model_errors, print_json, progress, quiet_transformers
from ferrolora.cli.models import DTYPES, QUANT_CHOICES, check_choice, load_model, load_tokenizer, require_directory
from ferrolora.errors import FormatError
from ferrolora.io.checkpoint import write_json
from ferrolora.train.data import TASKS, detect_task, label_names, read_causal, read_classification, split, split_causal
from ferrolora.train.loop import CHECKPOINTS, TrainResult, TrainSettings, accuracy, fit, newest_checkpoint
from ferrolora.train.memory import BaseMemory, base_memory, peak_resident_bytes
from ferrolora.train.tokenize import PadCollator, TokenizedData, tokenize_causal, tokenize_classification

LOG_NAME = "log.json"
PLOT_NAME = "loss.png"


@dataclass(frozen=True)
class Options:
    """What the command line asked for, beside `TrainSettings`."""

    model: str
    data: Path
    output: Path
    task: str
    eval_data: Path | None
    eval_fraction: float
    encoding: str
    max_length: int
    quant: str
    block_size: int
    double_quant: bool
    dtype: str
    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    rslora: bool
    gradient_checkpointing: bool
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class Prepared:
    """A quantized model and the data in its tokens."""

    model: Any
    memory: BaseMemory
    train: TokenizedData
    evaluation: TokenizedData | None
    collate: PadCollator
    labels: list[str] | None


def _toml(context: typer.Context, file: Path | None) -> Path | None:
    """Make the entries of a TOML file the defaults of the flags."""
    if file is not None:
        known = {parameter.name for parameter in context.command.params} - {"config", "as_json"}
        entries = {key.replace("-", "_"): value for key, value in _read_toml(file).items()}
        unknown = sorted(set(entries) - known)
        if unknown:
            raise typer.BadParameter(f"{file}: {unknown[0]!r} is no option; known are {', '.join(sorted(known))}")
        context.default_map = {**(context.default_map or {}), **entries}
    return file


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, quantized or not, or Hub name.")],
    data: Annotated[Path, typer.Option(help="jsonl, txt, csv, or lines of 'LABEL text'.")],
    output: Annotated[Path, typer.Option(help="Directory for the adapter, log.json and loss.png.")],
    config: Annotated[
        Path | None, typer.Option(is_eager=True, callback=_toml, help="TOML file with any of these options.")
    ] = None,
    task: Annotated[str, typer.Option(help="causal, classification, or auto: by the data file.")] = "auto",
    eval_data: Annotated[Path | None, typer.Option(help="Evaluate on this file after each epoch.")] = None,
    eval_fraction: Annotated[float, typer.Option(min=0.0, max=0.9, help="Or on this share of the data.")] = 0.0,
    encoding: Annotated[str, typer.Option(help="Text encoding of the data files.")] = "utf-8",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    quant: Annotated[str, typer.Option(help="Type of the base weights: nf4, fp4, int8 or none.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales as well.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Scale of the adapter times its rank; default 2 * rank.")] = None,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="On the adapter's input.")] = 0.05,
    target: Annotated[list[str] | None, typer.Option(help="Layers to adapt; default all-linear.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps at most; -1 for no limit.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Sequences in one pass.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Passes in one optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 2e-4,
    scheduler: Annotated[str, typer.Option(help="linear, cosine, constant, …")] = "linear",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are scaled down to this norm.")] = 1.0,
    log_every: Annotated[int, typer.Option(help="Steps between logged losses.")] = 10,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for one an epoch.")] = 0,
    seed: Annotated[int, typer.Option(help="Of data order, dropout and new weights.")] = 42,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, more time.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUTPUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the log as JSON to stdout.")] = False,
) -> None:
    """Train a LoRA adapter over a 4-bit base, for text (jsonl, txt) or classification (csv, label-text lines).

    jsonl lines hold "text", "messages", or "prompt" and "completion" (the loss counts the answers only); csv has the
    columns text and label. OUTPUT gets the adapter in PEFT's format, log.json and loss.png.
    """
    given = dict(locals())
    check_choice("--quant", quant, QUANT_CHOICES)
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--task", task, ("auto", *TASKS))
    given |= {"alpha": alpha if alpha is not None else 2 * rank, "targets": target or ["all-linear"]}
    try:
        settings = TrainSettings(**{name: given[name] for name in TrainSettings.__dataclass_fields__})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    options = Options(**{name: given[name] for name in Options.__dataclass_fields__})
    log = run(options, settings)
    if as_json:
        print_json(log)
    else:
        _print(log, options.output)


def run(options: Options, settings: TrainSettings) -> dict[str, Any]:
    """Train as asked; returns what `log.json` holds."""
    require_directory(options.model)
    _claim(options)
    quiet_transformers()
    import transformers

    transformers.set_seed(settings.seed)
    prepared = prepare(options, settings)
    model = _adapt(prepared.model, options, classification=prepared.labels is not None)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with progress("train") as update:
        result = fit(
            model,
            prepared.train,
            prepared.collate,
            options.output,
            settings,
            eval_data=prepared.evaluation,
            compute_metrics=accuracy if prepared.labels is not None else None,
            report=lambda done, total, figures: update(done, total, _note(figures)),
            resume=options.resume,
        )
    log = _log(options, settings, prepared, trainable, result)
    write_json(options.output / LOG_NAME, log)
    _plot(result, options)
    return log


def prepare(options: Options, settings: TrainSettings) -> Prepared:
    """Read the data, load the model (quantized as it loads) and tokenize."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    task = detect_task(options.data) if options.task == "auto" else options.task
    read: Any = read_classification if task == "classification" else read_causal
    part: Any = split if task == "classification" else split_causal
    train, held_out = read(options.data, options.encoding), None
    if options.eval_data is not None:
        held_out = read(options.eval_data, options.encoding)
    elif options.eval_fraction > 0:
        train, held_out = part(train, options.eval_fraction, settings.seed)

    labels = label_names(train) if task == "classification" else None
    with model_errors(options.model):
        tokenizer = load_tokenizer(options.model)
        extra = _label_options(labels) if labels is not None else {}
        cls = AutoModelForSequenceClassification if labels is not None else AutoModelForCausalLM
        quantization = (options.quant, options.dtype, options.block_size, options.double_quant)
        model = load_model(cls, options.model, *quantization, **extra)

    def tokens(examples: Any) -> TokenizedData:
        if labels is not None:
            return tokenize_classification(examples, labels, tokenizer, options.max_length)
        return tokenize_causal(examples, tokenizer, options.max_length)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad  # heads that read the last real token look for it
    evaluation = None if held_out is None else tokens(held_out)
    return Prepared(model, base_memory(model), tokens(train), evaluation, PadCollator(pad), labels)


def _adapt(model: Any, options: Options, classification: bool) -> Any:
    from ferrolora.adapters.lora import LoraConfig
    from ferrolora.model.kbit import prepare_model_for_kbit_training
    from ferrolora.model.tasks import get_peft_model

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.gradient_checkpointing)
    targets: str | list[str] = options.targets if options.targets != ["all-linear"] else "all-linear"
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        use_rslora=options.rslora,
        task_type="SEQ_CLS" if classification else "CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _claim(options: Options) -> None:
    output = options.output
    if Path(options.model).is_dir() and output.resolve() == Path(options.model).resolve():
        raise FormatError(f"{output}: is the model; give another directory for the adapter")
    if output.exists() and not output.is_dir():
        raise FormatError(f"{output}: is a file, not a directory")
    if options.resume:
        newest_checkpoint(output)
    elif output.is_dir() and any(output.iterdir()):
        if not options.overwrite:
            raise FormatError(f"{output}: exists and is not empty; --resume goes on, --overwrite starts anew")
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)


def _label_options(labels: list[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }


def _read_toml(file: Path) -> dict[str, Any]:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"  # the same module, before it entered the library
    parser = importlib.import_module(name)
    try:
        entries: dict[str, Any] = parser.loads(file.read_text(encoding="utf-8"))
        return entries
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error


def _note(figures: dict[str, float]) -> str:
    shown = {"loss": "loss", "eval_loss": "eval loss", "eval_accuracy": "accuracy"}
    return ", ".join(f"{name} {figures[key]:.3f}" for key, name in shown.items() if key in figures)


def _log(
    options: Options, settings: TrainSettings, prepared: Prepared, trainable: int, result: TrainResult
) -> dict[str, Any]:
    from ferrolora import _native

    chosen = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    return {
        "version": _native.version(),
        "options": {**chosen, **asdict(settings)},
        "labels": prepared.labels,
        "examples": {
            "train": len(prepared.train),
            "eval": None if prepared.evaluation is None else len(prepared.evaluation),
            "truncated": prepared.train.truncated,
            "dropped": prepared.train.dropped,
        },
        "base_memory": prepared.memory.to_dict(),
        "trainable_parameters": trainable,
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "peak_resident_bytes": peak_resident_bytes(),
        "metrics": result.metrics,
        "history": result.history,
    }


def _plot(result: TrainResult, options: Options) -> None:
    from ferrolora.train.report import plot_loss

    plot_loss(result, options.output / PLOT_NAME, f"{Path(options.model).name}, rank {options.rank}, {options.quant}")


def _print(log: dict[str, Any], output: Path) -> None:
    memory, metrics = log["base_memory"], log["metrics"]
    print(f"base in memory    {megabytes(memory['before'])} -> {megabytes(memory['after'])}")
    if memory["linear_parameters"]:
        sizes = f"{megabytes(memory['linear_before'])} -> {megabytes(memory['linear_after'])}"
        print(f"  quantized part  {sizes} ({memory['bits_per_parameter']:.3f} bits a weight)")
    print(f"trainable         {log['trainable_parameters']:,} parameters")
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    if losses:
        print(f"training loss     {losses[0]:.4f} -> {losses[-1]:.4f} in {log['steps']} steps, {log['seconds']:.0f} s")
    elif mean := [entry["train_loss"] for entry in log["history"] if "train_loss" in entry]:
        print(f"training loss     {mean[0]:.4f}, the mean of {log['steps']} steps, {log['seconds']:.0f} s")
    if "eval_loss" in metrics:
        print(f"evaluation loss   {metrics['eval_loss']:.4f}")
    if "eval_accuracy" in metrics:
        print(f"accuracy          {metrics['eval_accuracy']:.4f}")
    if log["examples"]["truncated"] or log["examples"]["dropped"]:
        print(f"examples          {log['examples']['truncated']} cut to length, {log['examples']['dropped']} left out")
    print(f"wrote             {output}: adapter, {LOG_NAME}, {PLOT_NAME}")
