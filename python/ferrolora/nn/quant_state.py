"""The tensors that stand for one quantized weight in a state dict, in the layout bitsandbytes reads and writes.

nf4, fp4: `weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4` (JSON as bytes) and,
with double quantization, `weight.nested_absmax` and `weight.nested_quant_map`. int8: `weight`, `SCB`, `weight_format`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.errors import FerroloraError, FormatError
from ferrolora.spec import NESTED_BLOCK_SIZE, QuantSpec
from ferrolora.tensor import QuantTensor

STATE_KEY = "weight.quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A map is 2 float32 roundings (linspace, midpoint) from the exact one whoever computed it: at most 2 ulp apart.
_MAP_RELATIVE = 2.0**-22


def state_keys(spec: QuantSpec) -> list[str]:
    """The keys of one weight under `spec`, without the module's prefix, in the order they are written."""
    if not spec.is_4bit:
        return ["weight", "SCB", "weight_format"]
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] if spec.double_quant else []
    return ["weight", "weight.absmax", "weight.quant_map", *nested, STATE_KEY + spec.quant_type]


def to_state(qt: QuantTensor) -> dict[str, Tensor]:
    """The state-dict entries of a quantized weight, keyed as `state_keys`.

    Args:
        qt: the weight; its own tensors go in, not copies.

    Returns:
        Key without prefix -> tensor, all on the device of qt.
    """
    device = qt.device
    if not qt.spec.is_4bit:
        layout = torch.zeros((), dtype=torch.uint8, device=device)  # 0: row-major
        return {"weight": qt.codes, "SCB": qt.absmax, "weight_format": layout}
    state = {"weight": qt.codes, "weight.absmax": qt.absmax, "weight.quant_map": _table(qt.spec.quant_type).to(device)}
    header: dict[str, Any] = {
        "quant_type": qt.spec.quant_type,
        "blocksize": qt.spec.block_size,
        "dtype": str(qt.dtype).removeprefix("torch."),
        "shape": list(qt.shape),
    }
    if qt.nested_absmax is not None and qt.offset is not None:
        state["weight.nested_absmax"] = qt.nested_absmax
        state["weight.nested_quant_map"] = _table("dynamic8").to(device)
        header |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": _number(qt.offset),
        }
    text = bytearray(json.dumps(header).encode())
    state[STATE_KEY + qt.spec.quant_type] = torch.frombuffer(text, dtype=torch.uint8).to(device)
    return state


def read_spec(state: Mapping[str, Tensor], prefix: str = "") -> QuantSpec:
    """The codec of the weight at `prefix` in a state dict.

    Raises:
        FormatError: there is no quantized weight there, or its description is not readable.
    """
    if f"{prefix}SCB" in state:
        return QuantSpec("int8")
    return _spec_of(_read_header(state, prefix), prefix)


def from_state(
    state: Mapping[str, Tensor],
    prefix: str = "",
    shape: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> QuantTensor:
    """Rebuild a quantized weight from a state dict, checking every length and both tables.

    Args:
        state: a state dict in the layout of this module; `weight` may be the packed bytes viewed as a float type
            (bitsandbytes' quant_storage).
        prefix: of the module, with its trailing dot. Default "".
        shape: the float shape the weight must have. Default None: what the state says.
        dtype: the float type of an int8 weight, which its state does not record. Default None: float32.

    Returns:
        A QuantTensor over the tensors of state, not copies.

    Raises:
        FormatError: a key is missing, or a length, type, table or header field disagrees; names the key.
    """
    if f"{prefix}SCB" in state:
        return _from_int8(state, prefix, shape, dtype)
    header = _read_header(state, prefix)
    spec = _spec_of(header, prefix)
    missing = [prefix + key for key in state_keys(spec) if prefix + key not in state]
    if missing:
        raise FormatError(f"the {spec.quant_type} weight {prefix}weight lacks {', '.join(missing)}")
    stated = _shape_of(header, prefix)
    if shape is not None and stated != tuple(shape):
        raise FormatError(f"{prefix}weight is {list(stated)} in the state dict; the layer is {list(shape)}")
    _check_table(state, f"{prefix}weight.quant_map", spec.quant_type)
    nested: Tensor | None = None
    offset: Tensor | None = None
    if spec.double_quant:
        _check_table(state, f"{prefix}weight.nested_quant_map", "dynamic8")
        nested = state[f"{prefix}weight.nested_absmax"]
        offset = torch.tensor(_offset_of(header, prefix), dtype=torch.float32, device=nested.device)
    codes = _packed_bytes(state[f"{prefix}weight"], math.prod(stated), prefix)
    absmax = state[f"{prefix}weight.absmax"]
    with _named(prefix):
        return QuantTensor(codes, absmax, nested, offset, spec, torch.Size(stated), _dtype_of(header, prefix))


def _from_int8(
    state: Mapping[str, Tensor], prefix: str, shape: tuple[int, int] | None, dtype: torch.dtype | None
) -> QuantTensor:
    codes = state.get(f"{prefix}weight")
    if codes is None or codes.dim() != 2:
        raise FormatError(f"{prefix}weight must be int8 [N, K], not {None if codes is None else list(codes.shape)}")
    if shape is not None and tuple(codes.shape) != tuple(shape):
        raise FormatError(f"{prefix}weight is {list(codes.shape)} in the state dict; the layer is {list(shape)}")
    layout = state.get(f"{prefix}weight_format")
    if layout is not None and layout.device.type != "meta" and (layout.numel() != 1 or int(layout) != 0):
        raise FormatError(f"{prefix}weight_format must be the scalar 0 (row-major), not {layout.tolist()}")
    with _named(prefix):
        spec, dtype = QuantSpec("int8"), dtype or torch.float32
        return QuantTensor(codes, state[f"{prefix}SCB"], None, None, spec, codes.shape, dtype)


@contextmanager
def _named(prefix: str) -> Iterator[None]:
    """What a constructor refuses is, here, a fault of the state dict at `prefix`."""
    try:
        yield
    except FerroloraError as error:
        raise FormatError(f"{prefix}weight: {error}") from error


def _number(offset: Tensor) -> float:
    """The offset for the header; a layer on the meta device has none yet and writes 0."""
    return 0.0 if offset.device.type == "meta" else float(offset)


def _table(name: str) -> Tensor:
    # + 0.0 makes 0.0 of fp4's -0.0, as it stands in bitsandbytes' files
    return torch.tensor(_native.codebook(name), dtype=torch.float32) + 0.0


def _check_table(state: Mapping[str, Tensor], key: str, name: str) -> None:
    found, table = state[key], _table(name)
    if found.dtype != torch.float32 or found.shape != table.shape:
        raise FormatError(f"{key} must be float32 {list(table.shape)}, not {found.dtype} {list(found.shape)}")
    if found.device.type == "meta":
        return
    off = ((found.cpu() - table).abs() > _MAP_RELATIVE * table.abs()).nonzero().flatten()
    if off.numel():
        i = int(off[0])
        raise FormatError(f"{key}[{i}] is {float(found[i])!r}, but the {name} table has {float(table[i])!r} there")


def _packed_bytes(weight: Tensor, numel: int, prefix: str) -> Tensor:
    if weight.dtype != torch.uint8 and weight.is_floating_point():
        weight = weight.contiguous().view(-1).view(torch.uint8)
    expected = (numel + 1) // 2
    if weight.dtype != torch.uint8 or weight.numel() != expected:
        raise FormatError(
            f"{prefix}weight must hold {expected} bytes for {numel} values, not {weight.numel()} of {weight.dtype}"
        )
    return weight.reshape(-1, 1)


def _read_header(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    keys = [key for kind in ("nf4", "fp4") if (key := f"{prefix}{STATE_KEY}{kind}") in state]
    if len(keys) != 1:
        raise FormatError(
            f"{prefix}weight is not a quantized weight: expected one of {prefix}{STATE_KEY}nf4, …fp4 or "
            f"{prefix}SCB, found {keys or 'none'}"
        )
    key = keys[0]
    packed = state[key]
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.device.type == "meta":
        raise FormatError(f"{key} must be JSON as uint8 bytes, not {packed.dtype} {list(packed.shape)} {packed.device}")
    try:
        header = json.loads(bytes(packed.tolist()).decode())
    except ValueError as error:
        raise FormatError(f"{key} does not hold JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{key} must hold a JSON object, not {header!r}")
    if header.get("quant_type") != key[-3:]:
        raise FormatError(f"{key} describes quant_type {header.get('quant_type')!r}")
    return header


def _spec_of(header: Mapping[str, Any], prefix: str) -> QuantSpec:
    double = "nested_offset" in header
    if double and header.get("nested_blocksize") != NESTED_BLOCK_SIZE:
        raise FormatError(
            f"{prefix}weight: nested_blocksize must be {NESTED_BLOCK_SIZE}, not {header.get('nested_blocksize')!r}"
        )
    if double and header.get("nested_dtype") != "float32":
        raise FormatError(f"{prefix}weight: nested_dtype must be 'float32', not {header.get('nested_dtype')!r}")
    with _named(prefix):
        return QuantSpec(header["quant_type"], header.get("blocksize", "missing"), double)


def _shape_of(header: Mapping[str, Any], prefix: str) -> tuple[int, ...]:
    shape = header.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise FormatError(f"{prefix}weight: shape must be a list of positive integers, not {shape!r}")
    return tuple(shape)


def _dtype_of(header: Mapping[str, Any], prefix: str) -> torch.dtype:
    name = header.get("dtype")
    if name not in _DTYPES:
        raise FormatError(f"{prefix}weight: dtype must be one of {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


def _offset_of(header: Mapping[str, Any], prefix: str) -> float:
    offset = header["nested_offset"]
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise FormatError(f"{prefix}weight: nested_offset must be a finite number, not {offset!r}")
    return float(offset)
