"""Does an installed wheel work at all: codec, fused op, adapter training, files, command line?

    PYTHON tests/smoke/smoke.py

A plain script with no test dependency, so that it runs under the oldest and the newest of everything we support.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/tiny, the small models

HEAVY = ("transformers", "accelerate", "matplotlib", "typer", "rich", "peft", "bitsandbytes")


def check_import_is_light() -> None:
    """`import ferrolora` loads none of the optional or heavy packages."""
    import ferrolora  # noqa: F401

    loaded = [name for name in HEAVY if name in sys.modules]
    assert not loaded, f"import ferrolora also imported {loaded}"


def check_codec() -> None:
    """A decoded NF4 weight is within half the widest gap of the table of the original, block by block."""
    import ferrolora as fl

    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    packed = fl.quantize(weight, fl.QuantSpec("nf4", block_size=64, double_quant=False))
    # Half of the gap between NF4 codes 0 and 1 is 0.15190; the float32 rounding of scale and product adds under 1e-6.
    scale = packed.absmax.repeat_interleave(64)[: weight.numel()].view_as(weight)
    assert ((packed.dequantize() - weight).abs() <= 0.152 * scale).all()


def check_training() -> None:
    """LoRA over the 4-bit base learns a constant sequence, and its files give the same logits again."""
    import ferrolora as fl
    from tiny.models import llama

    torch.manual_seed(0)
    base = fl.quantize_model(llama(), fl.QuantSpec(), skip_modules=["lm_head"])
    plain = copy.deepcopy(base)
    config = fl.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = fl.get_peft_model(base, config)
    tokens = torch.arange(16).repeat(2, 1)  # (B, T)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.eval().save_pretrained(folder)
        again = fl.PeftModel.from_pretrained(plain, folder).eval()
        assert torch.equal(model(input_ids=tokens).logits, again(input_ids=tokens).logits)


def check_command() -> None:
    """The installed command trains on a text file: Trainer, progress bars and the loss curve as well."""
    from tiny.folders import save
    from tiny.models import llama

    command = Path(sys.executable).with_name("ferrolora")
    with tempfile.TemporaryDirectory() as folder:
        model, data, out = save(llama(), Path(folder) / "model"), Path(folder) / "a.txt", Path(folder) / "out"
        data.write_text("the cat sat on the mat.\n" * 20)
        subprocess.run([command, "train", model, "--data", data, "--output", out, "--max-length", "32"], check=True)
        written = {path.name for path in out.iterdir()}
        assert written >= {"adapter_config.json", "adapter_model.safetensors", "log.json", "loss.png"}, written


def main() -> None:
    check_import_is_light()
    check_codec()
    check_training()
    check_command()
    import transformers

    from ferrolora import _native

    versions = f"ferrolora {_native.version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"smoke test passed: Python {sys.version.split()[0]}, {versions}, {_native.isa()}")


if __name__ == "__main__":
    main()
