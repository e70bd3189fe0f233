"""`ferrolora train`: from a data file to adapter, log and picture, by flags or TOML, and again after an interrupt."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import ferrolora as fl
from ferrolora.io.checkpoint import Checkpoint

FAST = ["--epochs", 2, "--batch-size", 4, "--log-every", 1, "--rank", 4, "--learning-rate", 1e-2]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(
        "text,label\n" + "".join(f"{'ab' * (1 + i % 3)} {'yes' if i % 2 else 'no'},{i % 2}\n" for i in range(12))
    )
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} ", "completion": "abc"}) + "\n" for i in range(8)))
    return path


def test_classification_writes_an_adapter_a_log_and_a_picture(cli, encoder: Path, rows: Path, tmp_path: Path) -> None:
    done = cli("train", encoder, "--data", rows, "--eval-data", rows, "--output", tmp_path / "out", *FAST)
    assert done.status == 0, done.err
    assert not done.err
    for word in ("base in memory", "bits a weight", "training loss", "evaluation loss", "accuracy"):
        assert word in done.out
    log = json.loads((tmp_path / "out/log.json").read_text())
    assert log["labels"] == ["0", "1"]
    assert log["steps"] == 6
    assert log["base_memory"]["after"] < log["base_memory"]["before"]
    assert log["history"][0]["loss"] > 0
    assert (tmp_path / "out/loss.png").stat().st_size > 0

    base = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=2, quantization_config=fl.FerroloraConfig()
    )
    model = fl.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_causal_training_on_prompts_and_completions(cli, causal: Path, pairs: Path, tmp_path: Path, quant: str) -> None:
    done = cli("train", causal, "--data", pairs, "--output", tmp_path / "out", "--quant", quant, "--json", *FAST)
    assert done.status == 0, done.err
    losses = [entry["loss"] for entry in json.loads(done.out)["history"] if "loss" in entry]
    assert losses[-1] < losses[0]


def test_plain_text_is_trained_in_blocks_with_its_end_held_out(cli, causal: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n" * 20)
    arguments = [
        "--data",
        tmp_path / "a.txt",
        "--output",
        tmp_path / "out",
        "--max-length",
        16,
        "--eval-fraction",
        0.25,
    ]
    done = cli("train", causal, *arguments, "--max-steps", 2, "--json")
    log = json.loads(done.out)
    assert log["examples"]["train"] == 23  # 360 of 480 characters in blocks of 16
    assert log["examples"]["eval"] == 8
    assert log["metrics"]["eval_loss"] > 0


def test_a_toml_file_gives_the_flags_and_the_command_line_wins(cli, encoder: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'data = "{rows}"\nmax-steps = 2\nbatch_size = 4\ntarget = ["query", "value"]\nrank = 2\n')
    done = cli("train", encoder, "--config", config, "--output", tmp_path / "out", "--rank", 3, "--json")
    assert done.status == 0, done.err
    options = json.loads(done.out)["options"]
    assert (options["rank"], options["max_steps"], options["batch_size"]) == (3, 2, 4)
    assert options["alpha"] == 6
    names = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names if "lora_" in name} == {"query", "value"}


def test_an_unknown_entry_in_the_toml_file_is_a_usage_error(cli, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("learnrate = 1\n")
    done = cli("train", "m", "--data", "d", "--output", "o", "--config", tmp_path / "run.toml")
    assert done.status == 2
    assert "'learnrate' is no option" in done.err


def test_resume_goes_on_to_the_losses_of_an_uninterrupted_run(cli, encoder: Path, rows: Path, tmp_path: Path) -> None:
    arguments = [encoder, "--data", rows, *FAST, "--save-every", 4]
    assert cli("train", *arguments, "--output", tmp_path / "whole").status == 0
    part = tmp_path / "part/checkpoints"
    part.mkdir(parents=True)
    (tmp_path / "whole/checkpoints/checkpoint-4").rename(part / "checkpoint-4")
    assert cli("train", *arguments, "--output", tmp_path / "part", "--resume").status == 0
    logs = [json.loads((tmp_path / name / "log.json").read_text())["history"] for name in ("whole", "part")]
    first, second = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert first == second


def test_an_output_with_content_is_kept_unless_asked(cli, encoder: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/note").write_text("mine")
    arguments = ["train", encoder, "--data", rows, "--output", tmp_path / "out", "--max-steps", 1]
    done = cli(*arguments)
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "--resume goes on, --overwrite starts anew" in done.err
    assert cli(*arguments, "--overwrite").status == 0


def test_a_model_that_is_not_there_is_named_in_one_line(cli, rows: Path, tmp_path: Path) -> None:
    done = cli("train", tmp_path / "none", "--data", rows, "--output", tmp_path / "out")
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert str(tmp_path / "none") in done.err


def test_a_weight_that_cannot_be_quantized_while_loading_is_named_in_one_line(cli, causal, pairs, tmp_path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shard = Checkpoint(causal).file_of[name]
    tensors = load_file(shard)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    done = cli("train", causal, "--data", pairs, "--output", tmp_path / "out")
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert f"{name} holds 1 NaN" in done.err
