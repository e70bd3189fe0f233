"""MEFT: decoder layers whose activations are recomputed from their outputs instead of being kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer, WeightSource
from ferrolora.adapters.config import PeftConfig, PeftType
from ferrolora.errors import UnsupportedError


@dataclass
class ReversibleConfig(PeftConfig):
    """Two streams through the decoder layers: h1' = λ·h1 + F(h2), h2' = β·h2 + G(h1'), then they change places.

    F is a layer of the model, G a trained bottleneck up(relu(down(h))), zero at the start. Only the last streams are
    kept; the backward pass inverts layer after layer: h2 = (h2' − G(h1'))/β, h1 = (h1' − F(h2))/λ. Rounding grows by
    about 1/λ a layer, so the streams are float32, and a backward pass whose inverted input differs from the true one
    by more than `max_drift` is refused.

    Args:
        r: width of the bottleneck. Default 64.
        scale_lambda: λ in (0, 1]; the smaller, the closer to the model as it was, the larger the drift. Default 0.1.
        scale_beta: β in (0, 1]. Default 1.
        max_drift: largest ‖inverted − true‖/‖true‖ of the first layer's input. Default 1e-2.
        layers: path of the list of layers in the model. Default None: the only nn.ModuleList of `num_hidden_layers`
            decoder layers.

    Raises:
        UnsupportedError: a number outside its range.

    Source: MEFT, arXiv 2306.00477.
    """

    r: int = 64
    scale_lambda: float = 0.1
    scale_beta: float = 1.0
    max_drift: float = 1e-2
    layers: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.REVERSIBLE
        if self.r < 1 or not 0 < self.scale_lambda <= 1 or not 0 < self.scale_beta <= 1 or self.max_drift <= 0:
            raise UnsupportedError(
                f"ReversibleConfig(r={self.r}, scale_lambda={self.scale_lambda}, scale_beta={self.scale_beta}, "
                f"max_drift={self.max_drift}): r at least 1, both scales in (0, 1], max_drift above 0"
            )


class ReversibleStack(AdapterLayer):
    """All decoder layers of a model in one module, which stands in their list in their place.

    Parameters of adapter `a`: `reversible_down.a` [layers, r, dim] and `reversible_up.a` [layers, dim, r].
    """

    containers = ("reversible_down", "reversible_up")

    def __init__(self, layers: nn.ModuleList, dim: int) -> None:
        super().__init__(layers)
        self.dim = dim
        self.reversible_down = nn.ParameterDict()
        self.reversible_up = nn.ParameterDict()
        self.configs: dict[str, ReversibleConfig] = {}
        self.drift: float | None = None  # of the last backward pass

    def __getattr__(self, name: str) -> Any:
        """What models ask of a layer (`attention_type`, …): the answer of the first."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", *self.containers):
                raise
            return getattr(self._modules["base_layer"][0], name)  # type: ignore[index]

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        self.check_new(name, path)
        assert isinstance(config, ReversibleConfig)
        count, device = len(self.layers), next(self.layers.parameters()).device
        down = torch.randn(count, config.r, self.dim, device=device) / self.dim**0.5
        self.reversible_down[name] = nn.Parameter(down)
        self.reversible_up[name] = nn.Parameter(torch.zeros(count, self.dim, config.r, device=device))
        self.configs[name] = config

    @property
    def layers(self) -> nn.ModuleList:
        """The model's own layers."""
        return self._modules["base_layer"]  # type: ignore[return-value]

    def activate(self, names: Sequence[str], trainable: bool) -> None:
        super().activate(names, trainable)
        if len(self.active_adapters) > 1:
            raise UnsupportedError(f"{self.active_adapters}: only one reversible adapter can be active")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden states [batch, length, dim] through all layers."""
        if not self.adapters_enabled or not self.active_adapters:
            for layer in self.layers:
                x = _hidden(layer(x, *args, **kwargs))
            return x
        name = self.active_adapters[0]
        config = self.configs[name]
        down, up = self.reversible_down[name], self.reversible_up[name]
        if not torch.is_grad_enabled() or not self.training:
            return self._plain(x, config, down, up, args, kwargs)
        kept = {key: value for key, value in kwargs.items() if key not in ("past_key_values", "use_cache")}
        steps = [_Step(layer, x.dtype, args, kept) for layer in self.layers]
        trained = [p for p in self.layers.parameters() if p.requires_grad]
        out: Tensor = _Reversible.apply(self, steps, config, x.float(), down, up, *trained)
        return out.to(x.dtype)

    def _plain(self, x: Tensor, config: ReversibleConfig, down: Tensor, up: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The same without inversion, every activation kept if gradients are asked for."""
        h1 = h2 = x.float()
        for index, layer in enumerate(self.layers):
            a = config.scale_lambda * h1 + _hidden(layer(h2.to(x.dtype), *args, **kwargs)).float()
            h1, h2 = config.scale_beta * h2 + bottleneck(a, down[index], up[index]), a
        return h2.to(x.dtype)

    def merge(self, names: Sequence[str]) -> None:
        raise UnsupportedError("a reversible adapter changes how layers are connected; no weight can hold it")

    def merged_module(self, names: Sequence[str], dtype: torch.dtype | None) -> nn.Module:
        raise UnsupportedError("a reversible adapter changes how layers are connected; no weight can hold it")

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        return self.forward(x)

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        raise UnsupportedError("a reversible adapter changes how layers are connected; no weight can hold it")


def bottleneck(h: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """G(h) = up·relu(down·h): h [..., dim], down [r, dim], up [dim, r]."""
    return torch.relu(h @ down.T) @ up.T


def _hidden(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


class _Step:
    """F of one layer, with the random numbers of its first call in every later one."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, args: Any, kwargs: Any) -> None:
        self.layer, self.dtype, self.args, self.kwargs = layer, dtype, args, kwargs
        self.state: Tensor | None = None

    def __call__(self, h: Tensor) -> Tensor:
        """F(h), float32."""
        if self.state is None:
            self.state = torch.get_rng_state()
            return self._run(h)
        with torch.random.fork_rng(devices=[h.device] if h.device.type == "cuda" else []):
            torch.set_rng_state(self.state)
            return self._run(h)

    def _run(self, h: Tensor) -> Tensor:
        return _hidden(self.layer(h.to(self.dtype), *self.args, **self.kwargs)).float()


class _Reversible(torch.autograd.Function):
    """Saves the stack's input and its two last streams, whatever the number of layers."""

    @staticmethod
    def forward(ctx: Any, stack: ReversibleStack, steps: Any, config: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        down, up = parameters[:2]
        h1 = h2 = x
        with torch.no_grad():
            for index, step in enumerate(steps):
                a = config.scale_lambda * h1 + step(h2)
                h1, h2 = config.scale_beta * h2 + bottleneck(a, down[index], up[index]), a
        ctx.stack, ctx.steps, ctx.config, ctx.trained = stack, steps, config, parameters[2:]
        ctx.save_for_backward(x, h1, h2, down, up)
        return h2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, b, a, down, up = ctx.saved_tensors
        config: ReversibleConfig = ctx.config
        d_a, d_b = grads[0].float(), torch.zeros_like(b)
        d_down, d_up = torch.zeros_like(down), torch.zeros_like(up)
        d_trained = [torch.zeros_like(p) for p in ctx.trained]
        for index in reversed(range(len(ctx.steps))):
            g, (g_a, g_down, g_up) = _through(bottleneck, [a, down[index], up[index]], d_b)
            d_down[index], d_up[index], d_a = g_down, g_up, d_a + g_a
            h2 = (b - g) / config.scale_beta
            f, (f_h, *f_trained) = _through(ctx.steps[index], [h2], d_a, ctx.trained)
            for total, part in zip(d_trained, f_trained, strict=True):
                total += part
            h1 = (a - f) / config.scale_lambda
            d_b, d_a = config.scale_lambda * d_a, config.scale_beta * d_b + f_h
            b, a = h1, h2
        drift = float((a - x).norm() / x.norm().clamp_min(torch.finfo(torch.float32).tiny))
        ctx.stack.drift = drift
        if not drift <= config.max_drift:
            raise UnsupportedError(
                f"reversible layers: the input recomputed through {len(ctx.steps)} layers is off by {drift:.1e} of its "
                f"norm, more than max_drift={config.max_drift:.1e}; use a larger scale_lambda or fewer layers"
            )
        return None, None, None, d_a + d_b, d_down, d_up, *d_trained


def _through(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """function(*inputs) without its graph, and the gradients of `upstream·output` by the inputs and `parameters`."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        wanted = [*leaves, *parameters]
        found = torch.autograd.grad(output, wanted, upstream, allow_unused=True, materialize_grads=True)
    return output.detach(), list(found)
