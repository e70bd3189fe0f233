"""`QuantLinear`: torch.nn.Linear with its weight in 4 or 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.errors import FormatError, ShapeError, UnsupportedError
from ferrolora.nn.quant_state import from_state, read_spec, state_keys, to_state
from ferrolora.nn.scales import types_kept
from ferrolora.nn.weight_view import FloatReading, PackedCodes
from ferrolora.ops.linear import LowRank, linear_packed
from ferrolora.ops.linear_group import Packed
from ferrolora.ops.quantize import quantize
from ferrolora.spec import QuantSpec
from ferrolora.tensor import QuantTensor, expected_parts

_DEFAULT = QuantSpec()
_SCALES = ("weight_absmax", "weight_nested_absmax", "weight_offset")


class QuantLinear(nn.Linear):
    """A linear layer over a frozen quantized weight: `y = x·deq(W)ᵀ + bias`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias `[N]`. Default True.
        spec: the codec. Default nf4, blocks of 64, double quantization.
        device: of the tensors; "meta" allocates nothing. Default None: torch's default device.
        dtype: of the bias, and of what `dequantize()` returns. Default None: torch's default type.

    Attributes:
        conv1d: whether it stands for a transformers `Conv1D`, whose float weight is `[K, N]`: merging and dequantizing
            a model then put one back. Default False.

    The tensors are not initialised: use `from_linear`, `from_quant_tensor` or `load_state_dict`.
    The parameter named "weight" is plain packed codes, frozen; its scales are buffers, whose type never follows
    `.to(dtype)`. What `layer.weight` gives can be read and moved like it, but neither written to nor computed with;
    after `read_as_float(model)` it is a float tensor `[N, K]` to read.
    """

    conv1d: bool = False
    reads_as_float = False
    weight_absmax: Tensor
    weight_nested_absmax: Tensor | None
    weight_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        spec: QuantSpec = _DEFAULT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the float weight
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.compute_dtype = torch.get_default_dtype() if dtype is None else dtype
        codes, *scales = (
            None if part is None else torch.empty(part[1], dtype=part[0], device=device)
            for part in expected_parts(spec, (out_features, in_features)).values()
        )
        assert codes is not None  # every codec has codes
        self.register_parameter("weight", nn.Parameter(codes, requires_grad=False))
        for name, scale in zip(_SCALES, scales, strict=True):
            self.register_buffer(name, scale)
        empty = torch.empty(out_features, device=device, dtype=self.compute_dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: QuantSpec = _DEFAULT, name: str | None = None) -> "QuantLinear":
        """Quantize a float layer. The bias is shared with it, not copied.

        Args:
            linear: weight float32, float16 or bfloat16 `[N, K]`.
            spec: the codec. Default nf4, blocks of 64, double quantization.
            name: what an error calls the weight. Default None.

        Raises:
            QuantizationError: the weight holds NaN or infinity.
        """
        layer = cls.from_quant_tensor(quantize(linear.weight, spec, name), linear.bias)
        return layer.train(linear.training)

    @classmethod
    def from_quant_tensor(cls, qt: QuantTensor, bias: nn.Parameter | None = None) -> "QuantLinear":
        """Wrap a quantized weight `[N, K]` and an optional bias `[N]`, both shared, not copied."""
        if len(qt.shape) != 2:
            raise ShapeError(f"QuantLinear needs a weight [N, K], not {list(qt.shape)}")
        n, k = qt.shape
        layer = cls(k, n, bias=False, spec=qt.spec, device="meta", dtype=qt.dtype)
        layer.weight = nn.Parameter(qt.codes, requires_grad=False)
        layer.weight_absmax = qt.absmax
        layer.weight_nested_absmax = qt.nested_absmax
        layer.weight_offset = qt.offset
        layer.register_parameter("bias", bias)
        return layer

    @property
    def codes(self) -> nn.Parameter:
        """The registered parameter "weight" itself: packed codes."""
        if "weight" not in self._parameters:
            raise AttributeError("this QuantLinear has no weight yet")
        codes = self._parameters["weight"]  # not get(): a sharded model gathers here
        assert codes is not None
        alias: Any = codes  # `weight` gives no Parameter, but says that it is one
        if type(alias) is PackedCodes:  # put into `_parameters` by code that took it from `weight`
            codes = self._parameters["weight"] = alias.parameter()
        return codes

    @property
    def weight(self) -> Tensor:
        """The weight as other libraries may use it: see `ferrolora.nn.weight_view`."""
        if self.reads_as_float:
            return FloatReading.of(self.quant_tensor())
        codes = self.codes
        return PackedCodes.over(codes) if type(codes) is nn.Parameter else codes  # sharded, fake: torch's own

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """For a parameter nn.Module's assignment comes before this one."""
        raise TypeError(f"the weight of a QuantLinear must be an nn.Parameter of packed codes, not {type(value)}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's, which `layer.weight = …` calls too; a float weight is refused."""
        if name == "weight" and param is not None and (param.is_floating_point() or param.is_complex()):
            raise UnsupportedError(
                f"the weight of a QuantLinear is packed codes, not {param.dtype} {list(param.shape)}; quantize it with "
                "QuantLinear.from_linear or with_weight, or put an nn.Linear in the place of the layer"
            )
        given: Any = param
        super().register_parameter(name, given.parameter() if type(given) is PackedCodes else given)

    @property
    def W_q(self) -> Tensor:
        """The packed weight, under the name by which PEFT finds layers that offer `dequantize()`."""
        return self.codes

    def quant_tensor(self) -> QuantTensor:
        """The weight as a QuantTensor over the layer's own tensors."""
        return QuantTensor(
            self.codes.detach(),
            self.weight_absmax,
            self.weight_nested_absmax,
            self.weight_offset,
            self.spec,
            torch.Size((self.out_features, self.in_features)),
            self.compute_dtype,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight `[N, K]`, freshly decoded, in `dtype` (default None: `compute_dtype`)."""
        return self.quant_tensor().dequantize(dtype)

    def with_weight(self, weight: Tensor) -> "QuantLinear":
        """A layer like this one over another float weight `[N, K]`, quantized the same way; the bias is shared."""
        qt = quantize(weight.detach().to(self.codes.device).contiguous(), self.spec)
        layer = type(self).from_quant_tensor(qt, self.bias)
        layer.compute_dtype, layer.conv1d = self.compute_dtype, self.conv1d
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """`x·deq(W)ᵀ + bias`: x `[..., K]`, float32, float16 or bfloat16, to `[..., N]` in the type of x."""
        return self._linear(x, None)

    def forward_with_low_rank(self, x: Tensor, lora: LowRank) -> Tensor:
        """`x·deq(W)ᵀ + bias + scaling·(drop(x)·Aᵀ)·Bᵀ` in one fused call; shapes as `ferrolora.linear`."""
        return self._linear(x, lora)

    def packed(self, lora: LowRank | None) -> Packed:
        """Its part in a `linear_group`, for layers that share x."""
        return Packed(
            self.codes,
            self.weight_absmax,
            self.weight_nested_absmax,
            self.weight_offset,
            self.spec.quant_type,
            self.spec.block_size,
            self.out_features,
            self.in_features,
            self.bias,
            lora,
        )

    def _linear(self, x: Tensor, lora: LowRank | None) -> Tensor:
        return linear_packed(x, *self.packed(lora))

    def extra_repr(self) -> str:
        spec = self.spec
        blocks = f", block_size={spec.block_size}, double_quant={spec.double_quant}" if spec.is_4bit else ""
        return f"{super().extra_repr()}, {spec.quant_type}{blocks}, compute_dtype={self.compute_dtype}"

    def reset_parameters(self) -> None:
        """Do nothing: a packed weight is loaded or quantized, never drawn at random."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        with types_kept(self, _SCALES, fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        self.compute_dtype = fn(torch.empty(1, dtype=self.compute_dtype, device=self.codes.device)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        state = to_state(self.quant_tensor())
        state["weight"] = self.codes
        if self.bias is not None:
            state["bias"] = self.bias
        for key, tensor in state.items():
            destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check the entries against this layer, then let nn.Module copy or assign them under the buffers' names."""
        keys = state_keys(self.spec)
        wanted = {prefix + key for key in (*keys, "bias")}
        found = {key for key in state_dict if key.startswith(prefix)}
        local = {key: state_dict[key] for key in found if key == f"{prefix}bias"}
        absent = [prefix + key for key in keys if prefix + key not in found]
        if not absent:
            local |= self._checked_entries(state_dict, prefix, local_metadata)
        elif len(absent) < len(keys):
            self._refuse_other_codec(state_dict, prefix)
        nn_missing: list[str] = []
        super()._load_from_state_dict(local, prefix, local_metadata, strict, nn_missing, unexpected_keys, error_msgs)
        quantized = {f"{prefix}{name}" for name in ("weight", *_SCALES)}
        missing_keys += absent + [key for key in nn_missing if key not in quantized]
        if strict:
            unexpected_keys += sorted(found - wanted - set(local))

    def _checked_entries(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> dict[str, Tensor]:
        shape = (self.out_features, self.in_features)
        qt = from_state(state_dict, prefix, shape, self.compute_dtype)
        if qt.spec != self.spec:
            raise FormatError(f"{prefix}weight was saved with {qt.spec}, but the layer was built with {self.spec}")
        if local_metadata.get("assign_to_params_buffers", False):
            self.compute_dtype = qt.dtype
        parts = zip(("weight", *_SCALES), (qt.codes, qt.absmax, qt.nested_absmax, qt.offset), strict=True)
        return {prefix + name: tensor for name, tensor in parts if tensor is not None}

    def _refuse_other_codec(self, state_dict: dict[str, Any], prefix: str) -> None:
        try:
            spec = read_spec(state_dict, prefix)
        except FormatError:
            return  # float or incomplete entries: the missing keys are reported by name
        if spec != self.spec:
            raise FormatError(f"{prefix}weight was saved with {spec}, but the layer was built with {self.spec}")


def read_as_float(model: nn.Module) -> int:
    """Let `weight` of every QuantLinear in `model` read as the float tensor deq(W) `[N, K]`, decoded at each use.

    For code that asks a linear layer for its weight's shape, type or values: adapter methods of other libraries,
    initializers, analyses. The parameters of the model, its files and its memory stay as they are.

    Returns:
        How many layers there are.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        layer.reads_as_float = True
    return len(layers)
