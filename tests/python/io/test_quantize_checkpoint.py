"""A float model directory to a quantized one, shard by shard."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ferrolora as fl
from ferrolora.errors import FormatError, QuantizationError
from ferrolora.io.checkpoint import Checkpoint, write_json
from ferrolora.io.quantize_checkpoint import PROGRESS_NAME, quantize_checkpoint
from ferrolora.nn.quant_state import to_state

SPECS = [fl.QuantSpec("nf4"), fl.QuantSpec("nf4", 128, double_quant=False), fl.QuantSpec("fp4"), fl.QuantSpec("int8")]
CONFIG = {"quant_method": "ferrolora"}


def source(directory: Path) -> Path:
    directory.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {"a.weight": torch.randn(6, 35).bfloat16(), "a.bias": torch.randn(6)},
        "model-00002-of-00002.safetensors": {"b.weight": torch.randn(20, 64), "norm.weight": torch.randn(6)},
    }
    for name, tensors in shards.items():
        save_file(tensors, directory / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(directory / "config.json", {"model_type": "any"})
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(directory)
    with checkpoint.reading() as reader:
        return {name: reader[name] for name in checkpoint.tensors}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_named_weight_is_stored_as_its_state_dict_and_the_rest_as_it_was(
    tmp_path: Path, spec: fl.QuantSpec
) -> None:
    before = tensors_of(source(tmp_path / "src"))
    summary = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight", "b.weight"], spec, CONFIG)
    expected = {"a.bias": before["a.bias"], "norm.weight": before["norm.weight"]}
    for layer in ("a", "b"):
        packed = fl.quantize(before[f"{layer}.weight"], spec)
        expected |= {f"{layer}.{key}": value for key, value in to_state(packed).items()}
    after = tensors_of(tmp_path / "dst")
    assert after.keys() == expected.keys()
    assert all(after[name].dtype == value.dtype and after[name].equal(value) for name, value in expected.items())
    assert summary.bytes_after == sum(value.nbytes for value in expected.values())
    assert json.loads((tmp_path / "dst/config.json").read_text()) == {
        "model_type": "any",
        "quantization_config": CONFIG,
    }


def test_a_transposed_weight_is_stored_as_rows_of_outputs(tmp_path: Path) -> None:
    before = tensors_of(source(tmp_path / "src"))
    spec = fl.QuantSpec()
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["b.weight"], spec, CONFIG, transposed=["b.weight"])
    expected = fl.quantize(before["b.weight"].T.contiguous(), spec)
    assert tensors_of(tmp_path / "dst")["b.weight"].equal(expected.codes)


def test_the_report_measures_the_error_of_each_weight(tmp_path: Path) -> None:
    before = tensors_of(source(tmp_path / "src"))
    summary = quantize_checkpoint(
        tmp_path / "src", tmp_path / "dst", ["b.weight"], fl.QuantSpec(), CONFIG, measure=True
    )
    (report,) = summary.reports
    error = before["b.weight"] - fl.quantize(before["b.weight"]).dequantize()
    assert report.max_error == error.abs().max()
    # One norm of the same numbers in another order of sums: a few float32 roundings of 20 * 64 terms.
    assert report.relative_error == pytest.approx(float(error.norm() / before["b.weight"].norm()), rel=1e-5)


def test_an_interrupted_run_goes_on_after_its_last_complete_shard(tmp_path: Path) -> None:
    source(tmp_path / "src")
    names = ["a.weight", "b.weight"]

    def stop_in_second_shard(name: str, done: int, total: int) -> None:
        if name == "b.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", names, SPECS[0], CONFIG, progress=stop_in_second_shard)
    first = tmp_path / "dst/model-00001-of-00002.safetensors"
    written = first.stat().st_mtime_ns
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == [first.name, PROGRESS_NAME]

    summary = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", names, SPECS[0], CONFIG)
    assert summary.resumed == 1
    assert first.stat().st_mtime_ns == written
    quantize_checkpoint(tmp_path / "src", tmp_path / "whole", names, SPECS[0], CONFIG)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "dst" / file.name).read_bytes() == file.read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
import ferrolora as fl
from ferrolora.io.quantize_checkpoint import quantize_checkpoint

def die(name, done, total):
    if name == "b.weight":
        os.kill(os.getpid(), signal.SIGKILL)

source, destination = map(Path, sys.argv[1:])
config = {"quant_method": "ferrolora"}
quantize_checkpoint(source, destination, ["a.weight", "b.weight"], fl.QuantSpec("nf4"), config, progress=die)
"""


def test_a_killed_run_goes_on_with_the_same_bytes_and_leaves_no_litter(tmp_path: Path) -> None:
    source(tmp_path / "src")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "src"), str(tmp_path / "dst")], check=False)
    assert killed.returncode == -9
    litter = [path.name for path in (tmp_path / "dst").iterdir() if path.suffix == ".tmp"]
    assert len(litter) == 1
    first = tmp_path / "dst/model-00001-of-00002.safetensors"
    written = first.stat().st_mtime_ns

    names = ["a.weight", "b.weight"]
    summary = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", names, SPECS[0], CONFIG)
    assert summary.resumed == 1
    assert first.stat().st_mtime_ns == written
    quantize_checkpoint(tmp_path / "src", tmp_path / "whole", names, SPECS[0], CONFIG)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "dst").iterdir()} == whole


def test_a_finished_shard_that_was_damaged_meanwhile_is_written_again(tmp_path: Path) -> None:
    source(tmp_path / "src")

    def stop_in_second_shard(name: str, done: int, total: int) -> None:
        if name == "b.weight":
            raise KeyboardInterrupt

    names = ["a.weight", "b.weight"]
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", names, SPECS[0], CONFIG, progress=stop_in_second_shard)
    first = tmp_path / "dst/model-00001-of-00002.safetensors"
    sound = first.read_bytes()
    first.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert quantize_checkpoint(tmp_path / "src", tmp_path / "dst", names, SPECS[0], CONFIG).resumed == 0
    assert first.read_bytes() == sound


def test_the_checksums_are_those_of_the_shards(tmp_path: Path) -> None:
    source(tmp_path / "src")
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight"], SPECS[0], CONFIG)
    shards = sorted((tmp_path / "dst").glob("*.safetensors"))
    lines = [f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}" for shard in shards]
    assert (tmp_path / "dst/SHA256SUMS").read_text().splitlines() == lines


def test_pickled_shards_give_the_same_checkpoint_as_safetensors(tmp_path: Path) -> None:
    before = tensors_of(source(tmp_path / "src"))
    (tmp_path / "pickled").mkdir()
    weight_map = {}
    for shard in sorted((tmp_path / "src").glob("*.safetensors")):
        name = f"pytorch_{shard.stem}.bin"
        torch.save(load_file(shard), tmp_path / "pickled" / name)
        weight_map |= dict.fromkeys(load_file(shard), name)
    write_json(tmp_path / "pickled/pytorch_model.bin.index.json", {"weight_map": weight_map})
    write_json(tmp_path / "pickled/config.json", {"model_type": "any"})
    assert tensors_of(tmp_path / "pickled").keys() == before.keys()
    for name in ("src", "pickled"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-q", ["a.weight", "b.weight"], SPECS[0], CONFIG)
    expected = tensors_of(tmp_path / "src-q")
    made = tensors_of(tmp_path / "pickled-q")
    assert made.keys() == expected.keys()
    assert all(made[name].equal(value) for name, value in expected.items())
    files = {path.name for path in (tmp_path / "src-q").iterdir()}
    assert {path.name for path in (tmp_path / "pickled-q").iterdir()} == files


PEAK = """
import sys, threading
from pathlib import Path
import ferrolora as fl
from ferrolora.io.quantize_checkpoint import quantize_checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def run(source, destination):
    names = [f"{i}.weight" for i in range(12)]
    quantize_checkpoint(Path(source), Path(destination), names, fl.QuantSpec(), {"quant_method": "ferrolora"})

run(sys.argv[1], sys.argv[3])  # libraries, threads and allocator have their memory after this
before = most = anonymous()
done = threading.Event()

def watch():
    global most
    while not done.wait(0.0005):
        most = max(most, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
run(sys.argv[2], sys.argv[4])
done.set()
watcher.join()
print(most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux' account of memory")
@pytest.mark.parametrize("pickled", [False, True])
def test_memory_is_the_largest_tensor_and_a_constant(tmp_path: Path, pickled: bool) -> None:
    for name, width in (("small", 64), ("large", 1024)):
        (tmp_path / name).mkdir()
        tensors = {f"{i}.weight": torch.randn(width, 2048) for i in range(12)}
        if pickled:
            torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / name / "model.safetensors")
        write_json(tmp_path / name / "config.json", {"model_type": "any"})
    folders = [str(tmp_path / name) for name in ("small", "large", "small-q", "large-q")]
    run = subprocess.run([sys.executable, "-c", PEAK, *folders], check=True, capture_output=True, text=True)
    tensor = 1024 * 2048 * 4  # bytes; the model is 12 of them
    # one tensor (its copy out of the file) and its codes (an eighth of it), then 8 MiB for buffers of files and threads
    assert int(run.stdout) <= 1.125 * tensor + 8 * 2**20


def test_a_beginning_with_other_settings_is_not_taken_for_ours(tmp_path: Path) -> None:
    source(tmp_path / "src")

    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight"], SPECS[0], CONFIG, progress=stop)
    with pytest.raises(FormatError, match="exists and is not empty"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight"], SPECS[1], CONFIG)


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    source(tmp_path / "src")
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight"], SPECS[0], CONFIG)
    with pytest.raises(FormatError, match="--overwrite"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight"], SPECS[0], CONFIG)
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight"], SPECS[3], CONFIG, overwrite=True)
    assert tensors_of(tmp_path / "dst")["a.weight"].dtype == torch.int8


def test_a_weight_with_a_nan_is_named_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    source(tmp_path / "src")
    shard = tmp_path / "src/model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["b.weight"][3, 5] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(QuantizationError, match=r"b\.weight"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight", "b.weight"], SPECS[0], CONFIG)
    assert not (tmp_path / "dst/config.json").exists()


def test_a_quantized_source_and_an_unknown_weight_are_refused(tmp_path: Path) -> None:
    source(tmp_path / "src")
    with pytest.raises(FormatError, match=r"holds no tensor 'c\.weight'"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["c.weight"], SPECS[0], CONFIG)
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", ["a.weight"], SPECS[0], CONFIG)
    with pytest.raises(FormatError, match="quantized already"):
        quantize_checkpoint(tmp_path / "dst", tmp_path / "again", ["b.weight"], SPECS[0], CONFIG)
