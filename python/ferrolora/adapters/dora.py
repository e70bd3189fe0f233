"""DoRA's ‖W + sBA‖ of each output row, without the weight in float at each step."""

from typing import Any

import torch
from torch import Tensor


class RowNorms:
    """n² = ‖W‖² + 2s·Σ_r (W·Aᵀ)∘B + s²·Σ_r (B·(A·Aᵀ))∘B for each output row, in float32 or wider.

    ‖W‖² is taken once. W·Aᵀ costs as much as a forward pass of r tokens: a packed weight is decoded a tile at a time
    by the ordinary product. While a model is in evaluation mode the result is kept as long as A and B are equal to
    those it was computed from; they are compared by value, since optimizers write past torch's version counters.
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        self._kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # name -> (A, B, norms)

    def forget(self, name: str) -> None:
        """Drops what is kept for an adapter."""
        self._kept.pop(name, None)

    @torch.no_grad()
    def __call__(self, layer: Any, name: str, a: Tensor, b: Tensor, scaling: float, use_cache: bool) -> Tensor:
        """The norms `[out]` of `layer` with A `[r, in]` and B `[out, r]`.

        Args:
            layer: offers `float_weight()`, `matrix(weight)` and `product_with_weight(a)`.
            name: under which the result is kept.
            a: [r, in].
            b: [out, r].
            scaling: s.
            use_cache: whether to use and keep the result.
        """
        if use_cache and name in self._kept:
            kept_a, kept_b, norms = self._kept[name]
            if kept_a.device == a.device and torch.equal(kept_a, a) and torch.equal(kept_b, b):
                return norms
        self._kept.pop(name, None)
        with torch.autocast(a.device.type, enabled=False):
            norms = self._compute(layer, a, b, scaling)
        if use_cache:
            self._kept[name] = (a.clone(), b.clone(), norms)
        return norms

    def _compute(self, layer: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        if self._squares is None or self._squares.device != a.device:
            self._squares = layer.matrix(layer.float_weight()).square().sum(1)  # [out]
        cross = (layer.product_with_weight(a).to(wide) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        norms: Tensor = (self._squares + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()
        return norms
