"""Some rows of an embedding, trained and saved as they are."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer, WeightSource, adapter_dtype
from ferrolora.adapters.config import PeftConfig
from ferrolora.errors import TargetError, UnsupportedError


class TrainableTokens(AdapterLayer):
    """y = W[ids], but for the chosen ids the trained row; on a head tied to the embedding, their logits likewise.

    The trained rows start as the embedding's own and replace them: nothing is added.

    Args:
        base_layer: an nn.Embedding, or the nn.Linear whose weight is tied to it.
        tied_to: the tokens of the embedding, whose rows a tied head shares. Default None: own rows.
    """

    containers = ("token_adapter.trainable_tokens_delta",)

    def __init__(self, base_layer: nn.Module, tied_to: "TrainableTokens | None" = None) -> None:
        super().__init__(base_layer)
        self.token_adapter = nn.Module()
        self.token_adapter.trainable_tokens_delta = nn.ParameterDict()
        self.indices: dict[str, Tensor] = {}
        self._tied_to = [tied_to]  # in a list: its parameters belong to the embedding

    @property
    def source(self) -> "TrainableTokens":
        """Where the rows are: this module, or the embedding it is tied to."""
        return self._tied_to[0] or self

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        raise UnsupportedError(f"{path}: tokens are added with add_tokens")

    def add_tokens(self, name: str, indices: Sequence[int], path: str, autocast_dtype: bool) -> None:
        """Gives adapter `name` its own rows for the token ids `indices`.

        Raises:
            TargetError: an id outside the vocabulary, or one twice.
        """
        self.check_new(name, path)
        rows = torch.tensor([int(index) for index in indices], dtype=torch.long)
        if (
            len(rows) == 0
            or len(set(rows.tolist())) != len(rows)
            or rows.min() < 0
            or rows.max() >= self.weight.shape[0]
        ):
            raise TargetError(
                f"trainable_token_indices {list(indices)} for {path} must be different ids below {self.weight.shape[0]}"
            )
        self.indices[name] = rows
        dtype = adapter_dtype(self.base_layer, autocast_dtype)
        values = self.weight.detach()[rows.to(self.weight.device)].to(dtype)
        self.entries(self.containers[0])[name] = nn.Parameter(values.clone())

    def adapter_names(self) -> list[str]:
        return super().adapter_names() if self.source is self else self.source.adapter_names()

    def activate(self, names: Sequence[str], trainable: bool) -> None:
        super().activate(names, trainable)
        if len(self.active_adapters) > 1:
            raise UnsupportedError(f"adapters {self.active_adapters} each train rows of one embedding; activate one")

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.indices.pop(name, None)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """ids [...] → [..., dim]; on a head x [..., dim] → [..., vocabulary]."""
        y: Tensor = self.base_layer(x)
        for name in names:
            rows, indices = self.source.entry(self.containers[0], name), self.source.indices[name].to(x.device)
            if isinstance(self.base_layer, nn.Embedding):
                y = self._look_up(x, y, rows, indices)
            else:
                logits = F.linear(x, rows.to(x.dtype), None if self.bias is None else self.bias[indices])
                y = y.index_copy(-1, indices, logits.to(y.dtype))
        return y

    def _look_up(self, ids: Tensor, y: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
        places = torch.full((self.weight.shape[0],), -1, device=ids.device)
        places[indices] = torch.arange(len(indices), device=ids.device)
        place = places[ids]
        scale: Any = getattr(self.base_layer, "embed_scale", 1.0)
        trained = (rows[place.clamp_min(0)] * scale).to(y.dtype)
        return torch.where((place >= 0)[..., None], trained, y)

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        total = weight.clone()
        for name in names:
            rows = cast(Tensor, self.source.entry(self.containers[0], name)).detach()
            total[self.source.indices[name].to(total.device)] = rows.to(total)
        return total
