"""`ferrolora generate`: continue a prompt, with or without an adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ferrolora.cli.console import model_errors, print_json, quiet_transformers
from ferrolora.cli.models import DTYPES, QUANT_CHOICES, check_choice, load_model, load_tokenizer, require_directory


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, quantized or not, or Hub name.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the likeliest tokens to draw from.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the tokenizer's chat template.")] = False,
    quant: Annotated[str, typer.Option(help="Quantize a float model: nf4, fp4, int8 or none.")] = "nf4",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON when done.")] = False,
) -> None:
    """Generate text, written as it comes."""
    check_choice("--quant", quant, QUANT_CHOICES)
    check_choice("--dtype", dtype, DTYPES)
    quiet_transformers()
    from transformers import AutoModelForCausalLM, TextStreamer, set_seed

    require_directory(model)
    with model_errors(model):
        tokenizer = load_tokenizer(model)
        network = load_model(AutoModelForCausalLM, model, quant, dtype)
    if adapter is not None:
        from ferrolora.model.peft_model import PeftModel

        network = PeftModel.from_pretrained(network, str(adapter))
    network.eval()
    set_seed(seed)
    ids = _encode(tokenizer, prompt, chat)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    started = time.perf_counter()
    output = network.generate(
        **ids,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **(sampling or {"do_sample": False}),
    )
    seconds = time.perf_counter() - started
    new = output[0, ids["input_ids"].shape[1] :]
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print_json({"prompt": prompt, "text": text, "tokens": len(new), "seconds": round(seconds, 3)})


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template is None:
        raise typer.BadParameter("the tokenizer has no chat template; leave --chat out")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")
