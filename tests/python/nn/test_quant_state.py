"""The state-dict form of one weight: written as published, and refused wherever it disagrees with itself."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import ferrolora as fl
from ferrolora.nn.quant_state import STATE_KEY, from_state, read_spec, state_keys, to_state

NF4 = STATE_KEY + "nf4"


def make_state(spec: fl.QuantSpec | None = None) -> dict[str, Tensor]:
    qt = fl.quantize(torch.randn(10, 100, dtype=torch.bfloat16), spec or fl.QuantSpec())
    return {f"fc.{key}": tensor for key, tensor in to_state(qt).items()}


def header_of(state: dict[str, Tensor]) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(bytes(state[f"fc.{NF4}"].tolist()))
    return header


def with_header(state: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    header = {key: value for key, value in (header_of(state) | changes).items() if value is not ...}
    return state | {f"fc.{NF4}": torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)}


def test_the_header_is_the_published_json() -> None:
    qt = fl.quantize(torch.randn(10, 100, dtype=torch.bfloat16))
    assert qt.offset is not None
    text = bytes(to_state(qt)[NF4].tolist()).decode()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [10, 100], '
        f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {float(qt.offset)!r}}}'
    )


@pytest.mark.parametrize(
    "spec",
    [fl.QuantSpec(), fl.QuantSpec("fp4", 32), fl.QuantSpec("nf4", 4096, double_quant=False), fl.QuantSpec("int8")],
)
def test_a_weight_comes_back_as_it_was(spec: fl.QuantSpec) -> None:
    state = make_state(spec)
    assert [f"fc.{key}" for key in state_keys(spec)] == list(state)
    assert read_spec(state, "fc.") == spec
    qt = from_state(state, "fc.", (10, 100), torch.bfloat16)
    again = {f"fc.{key}": tensor for key, tensor in to_state(qt).items()}
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert (qt.spec, qt.shape, qt.dtype) == (spec, (10, 100), torch.bfloat16)


@pytest.mark.parametrize("key", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax"])
def test_a_missing_entry_is_named(key: str) -> None:
    state = make_state()
    del state[f"fc.{key}"]
    with pytest.raises(fl.FormatError, match=f"the nf4 weight fc.weight lacks fc.{key}$"):
        from_state(state, "fc.")


def test_a_state_without_a_quantized_weight_is_refused() -> None:
    with pytest.raises(fl.FormatError, match=r"fc\.weight is not a quantized weight: expected one of .*found none"):
        from_state({"fc.weight": torch.randn(4, 4)}, "fc.")


def test_two_headers_are_refused() -> None:
    state = make_state()
    state[f"fc.{STATE_KEY}fp4"] = state[f"fc.{NF4}"]
    with pytest.raises(fl.FormatError, match=r"found .*nf4.*fp4"):
        from_state(state, "fc.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, "describes quant_type 'fp4'"),
        ({"blocksize": 48}, "block_size 48 is unknown"),
        ({"blocksize": ...}, "block_size 'missing' is unknown"),
        ({"blocksize": 128}, r"absmax .*block_size 128.* must be torch.uint8 \[8\], not torch.uint8 \[16\]"),
        ({"dtype": "float8"}, "dtype must be one of float32, float16, bfloat16, not 'float8'"),
        ({"shape": [10, 101]}, "must hold 505 bytes for 1010 values, not 500"),
        ({"shape": [10, -100]}, r"shape must be a list of positive integers, not \[10, -100\]"),
        ({"shape": None}, "shape must be a list"),
        ({"nested_blocksize": 128}, "nested_blocksize must be 256, not 128"),
        ({"nested_dtype": "float16"}, "nested_dtype must be 'float32', not 'float16'"),
        ({"nested_offset": "much"}, "nested_offset must be a finite number, not 'much'"),
        ({"nested_offset": float("nan")}, "nested_offset must be a finite number, not nan"),
        ({"nested_offset": ...}, r"absmax .* must be torch.float32 \[16\], not torch.uint8"),
    ],
)
def test_a_header_that_disagrees_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(fl.FormatError, match=message):
        from_state(with_header(make_state(), **changes), "fc.")


@pytest.mark.parametrize("header", [b"{", b"\xff\xfe", b"[1, 2]"])
def test_a_header_that_is_not_a_json_object_is_refused(header: bytes) -> None:
    state = make_state() | {f"fc.{NF4}": torch.tensor(list(header), dtype=torch.uint8)}
    with pytest.raises(fl.FormatError, match="JSON"):
        from_state(state, "fc.")


@pytest.mark.parametrize(("key", "index"), [("quant_map", 3), ("nested_quant_map", 200)])
def test_another_table_is_refused_at_its_first_difference(key: str, index: int) -> None:
    state = make_state()
    state[f"fc.weight.{key}"][index] *= 1.00001
    with pytest.raises(fl.FormatError, match=rf"fc\.weight\.{key}\[{index}\] is .* but the .* table has"):
        from_state(state, "fc.")


def test_a_table_that_differs_by_its_own_rounding_is_read() -> None:
    state = make_state()
    table = state["fc.weight.nested_quant_map"]
    state["fc.weight.nested_quant_map"] = table.nextafter(torch.zeros(()))
    assert from_state(state, "fc.").spec == fl.QuantSpec()


@pytest.mark.parametrize("key", ["absmax", "nested_absmax", "quant_map", "nested_quant_map"])
def test_an_entry_of_the_wrong_length_or_type_is_refused(key: str) -> None:
    state = make_state()
    name = f"fc.weight.{key}"
    for wrong in (state[name][:-1], state[name].double()):
        with pytest.raises(fl.FormatError, match=key):
            from_state(state | {name: wrong}, "fc.")


def test_a_weight_of_the_wrong_type_is_refused() -> None:
    state = make_state()
    for wrong in (state["fc.weight"].view(torch.int8), state["fc.weight"].repeat(2, 1)):
        with pytest.raises(fl.FormatError, match=r"fc\.weight must hold 500 bytes for 1000 values"):
            from_state(state | {"fc.weight": wrong}, "fc.")


def test_int8_entries_that_disagree_are_refused() -> None:
    state = make_state(fl.QuantSpec("int8"))
    with pytest.raises(fl.FormatError, match=r"absmax .*must be torch.float32 \[10\], not torch.float32 \[9\]"):
        from_state(state | {"fc.SCB": state["fc.SCB"][1:]}, "fc.")
    with pytest.raises(fl.FormatError, match=r"fc.weight must be int8 \[N, K\], not None"):
        from_state({"fc.SCB": state["fc.SCB"]}, "fc.")
    with pytest.raises(fl.FormatError, match=r"weight_format must be the scalar 0 \(row-major\), not 3"):
        from_state(state | {"fc.weight_format": torch.tensor(3, dtype=torch.uint8)}, "fc.")
    with pytest.raises(fl.FormatError, match=r"\[10, 100\] in the state dict; the layer is \[100, 10\]"):
        from_state(state, "fc.", (100, 10))
