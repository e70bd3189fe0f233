"""`QuantStack`: the matrices of all experts of one projection, each packed by itself, in one tensor a part."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ferrolora.errors import FerroloraError, FormatError, ShapeError
from ferrolora.ops.quantize import quantize
from ferrolora.spec import QuantSpec
from ferrolora.tensor import QuantTensor, expected_parts

PARTS = ("codes", "absmax", "nested_absmax", "offset")
HEADER = "header"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class QuantStack:
    """`[E, N, K]` as E quantized matrices `[N, K]`, which share neither blocks nor nested scales nor an offset.

    Args:
        codes: nf4, fp4: uint8 `[E, (N*K + 1) // 2, 1]`; int8: int8 `[E, N, K]`.
        absmax: `[E, blocks]`, of int8 `[E, N]`; float32, or uint8 with double quantization.
        nested_absmax: float32 `[E, ceil(blocks / 256)]`; None without double quantization.
        offset: float32 `[E]`; None without double quantization.
        spec: the codec.
        shape: `[E, N, K]`.
        dtype: the float type before quantization.

    Raises:
        ShapeError: a part does not have the shape or type that spec and shape call for.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    spec: QuantSpec
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name, expected in expected_stack(self.spec, self.shape).items():
            tensor: Tensor | None = getattr(self, name)
            seen = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
            if seen != expected:
                experts = f"{self.spec.quant_type} experts of shape {list(self.shape)}"
                raise ShapeError(f"{name} of {experts} must be {expected}, not {seen}")

    def expert(self, index: int) -> QuantTensor:
        """The matrix `[N, K]` of one expert: views, no copies."""
        nested = None if self.nested_absmax is None else self.nested_absmax[index]
        offset = None if self.offset is None else self.offset[index]
        return QuantTensor(self.codes[index], self.absmax[index], nested, offset, self.spec, self.shape[1:], self.dtype)

    def numel(self) -> int:
        """The number of values (not of bytes)."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and offsets."""
        return sum(part.nbytes for part in (getattr(self, name) for name in PARTS) if part is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float values `[E, N, K]` in `dtype` (default None: `self.dtype`), expert by expert."""
        dtype = self.dtype if dtype is None else dtype
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for index in range(self.shape[0]):
            out[index] = self.expert(index).dequantize(dtype)
        return out


def expected_stack(
    spec: QuantSpec, shape: tuple[int, ...] | torch.Size
) -> dict[str, tuple[torch.dtype, tuple[int, ...]] | None]:
    """The (dtype, shape) of each part of a stack `[E, N, K]`; None: the codec does not have it."""
    if len(shape) != 3:
        raise ShapeError(f"the weights of experts must be [E, N, K], not {list(shape)}")
    parts = expected_parts(spec, tuple(shape[1:]))
    return {name: None if part is None else (part[0], (shape[0], *part[1])) for name, part in parts.items()}


def empty_stack(
    spec: QuantSpec, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str
) -> QuantStack:
    """A stack `[E, N, K]` whose tensors are not initialised."""
    parts = (
        None if part is None else torch.empty(part[1], dtype=part[0], device=device)
        for part in expected_stack(spec, shape).values()
    )
    codes, absmax, nested, offset = parts
    assert codes is not None and absmax is not None  # every codec has these
    return QuantStack(codes, absmax, nested, offset, spec, torch.Size(shape), dtype)


@torch.no_grad()
def quantize_stack(w: Tensor, spec: QuantSpec, name: str | None = None) -> QuantStack:
    """Quantize the experts of `w` one by one.

    Args:
        w: float32, float16 or bfloat16 `[E, N, K]`.
        spec: the codec.
        name: what an error calls the tensor. Default None.

    Raises:
        QuantizationError: an expert holds NaN or infinity; names it.
        ShapeError: w is not `[E, N, K]`.
    """
    stack = empty_stack(spec, w.shape, w.dtype, w.device)
    for index, matrix in enumerate(w):
        packed = quantize(matrix, spec, f"{name or 'w'}[{index}]")
        for part in PARTS:
            if getattr(packed, part) is not None:
                getattr(stack, part)[index] = getattr(packed, part)
    return stack


def stack_state(stack: QuantStack) -> dict[str, Tensor]:
    """The tensors of a file by part, and `header`: codec, shape and float type as JSON in uint8."""
    fields = {**asdict(stack.spec), "dtype": str(stack.dtype).removeprefix("torch."), "shape": list(stack.shape)}
    state = {name: part for name in PARTS if (part := getattr(stack, name)) is not None}
    state[HEADER] = torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8).to(stack.codes.device)
    return state


def stack_from_state(state: Mapping[str, Tensor], where: str) -> QuantStack:
    """A stack over the tensors of `stack_state`, not copies.

    Args:
        state: by part.
        where: what an error calls the weight.

    Raises:
        FormatError: the header is not readable, or a part is missing or does not agree with it.
    """
    header = _header(state, where)
    try:
        spec = QuantSpec(header["quant_type"], header["block_size"], header["double_quant"])
        parts = {name: state.get(name) for name in PARTS}
        return QuantStack(**parts, spec=spec, shape=torch.Size(header["shape"]), dtype=_DTYPES[header["dtype"]])  # type: ignore[arg-type]  # __post_init__ checks them
    except (KeyError, TypeError) as error:
        raise FormatError(f"{where}: its header {header} lacks or misstates {error}") from error
    except FerroloraError as error:
        raise FormatError(f"{where}: {error}") from error


def _header(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    text = state.get(HEADER)
    if text is None or text.dtype != torch.uint8 or text.dim() != 1 or text.device.type == "meta":
        raise FormatError(f"{where}: packed experts need a header, JSON as uint8 bytes, not {text}")
    try:
        header = json.loads(bytes(text.tolist()).decode())
    except ValueError as error:
        raise FormatError(f"{where}: its header does not hold JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{where}: its header must be a JSON object, not {header!r}")
    return header
