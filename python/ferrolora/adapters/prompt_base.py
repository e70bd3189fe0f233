"""What every method of virtual tokens has: its sizes, and an encoder that makes the tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ferrolora.adapters.config import PeftConfig
from ferrolora.errors import FormatError, ShapeError, UnsupportedError

FILE_KEY = "prompt_embeddings"  # the finished tokens, in every file


@dataclass
class PromptLearningConfig(PeftConfig):
    """The part of a configuration that says how many virtual tokens there are and what shape they have.

    Args:
        num_virtual_tokens: n; required.
        token_dim: width of a token; default None: the model's.
        num_transformer_submodules: 2 for an encoder and a decoder, else 1; default None: by the task.
        num_attention_heads: heads that keys and values have; default None: the model's.
        num_layers: layers that keys and values go to; default None: the model's.
        modules_to_save: names of modules that are trained and saved in full. Default None.

    Raises:
        UnsupportedError: no positive `num_virtual_tokens`.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: Sequence[str] | None = None

    takes_task_ids: ClassVar[bool] = False
    gives_keys_and_values: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.num_virtual_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UnsupportedError(f"{type(self).__name__}(num_virtual_tokens={count!r}) must be a positive integer")
        if isinstance(self.modules_to_save, str):
            raise UnsupportedError(f"{type(self).__name__}: modules_to_save must be a list of names")

    @property
    def is_prompt_learning(self) -> bool:
        return True

    def sizes(self) -> tuple[int, int]:
        """(virtual tokens over all submodules, width); the configuration must be made concrete for a model."""
        assert self.num_virtual_tokens is not None
        assert self.token_dim is not None
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1), self.token_dim


class PromptStart(NamedTuple):
    """What an encoder may start from.

    Attributes:
        vocabulary: number of tokens of the model.
        rows: token ids [n] → their embeddings [n, dim].
        text: token ids of the text to start from, or None.
        source: tensors of another adapter's file, or None.
    """

    vocabulary: int
    rows: Callable[[Tensor], Tensor]
    text: Sequence[int] | None = None
    source: Mapping[str, Tensor] | None = None


class PromptEncoder(nn.Module, ABC):
    """Makes the virtual tokens of one adapter."""

    @abstractmethod
    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """The tokens `[n, dim]`, or `[batch, n, dim]` if they depend on `task_ids` [batch]."""

    def to_file(self) -> dict[str, Tensor]:
        """The tensors of a file by key: the finished tokens, and what training needs to go on."""
        with torch.no_grad():
            return {FILE_KEY: self.eval_tokens()}

    @abstractmethod
    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors of a file. Raises FormatError or ShapeError for one that is missing or does not fit."""

    def eval_tokens(self) -> Tensor:
        """The tokens as they are used when nothing is dropped, detached."""
        training = self.training
        self.eval()
        tokens: Tensor = self(None).detach()
        self.train(training)
        return tokens


class Reparameterized(PromptEncoder):
    """Tokens that a small network makes of an embedding while they are trained.

    A file holds the finished tokens under PEFT's key, and the network under `prompt_encoder.*`, which PEFT passes
    over: with it training goes on where it stopped. Without it (a file of PEFT) the finished tokens become the
    parameters, and the network goes.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: nn.Module | None = network
        self.register_parameter("tokens", None)

    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """[n, dim]."""
        made: Tensor = self.tokens if self.network is None else self.network()
        return made

    def to_file(self) -> dict[str, Tensor]:
        kept = {} if self.network is None else self.network.state_dict()
        return super().to_file() | {f"prompt_encoder.{key}": value.detach() for key, value in kept.items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        own = {
            key.removeprefix("prompt_encoder."): t for key, t in tensors.items() if key.startswith("prompt_encoder.")
        }
        if own and self.network is not None:
            places = self.network.state_dict()
            if places.keys() != own.keys():
                raise FormatError(f"the file's prompt encoder has {sorted(own)}, this one {sorted(places)}")
            for key, place in places.items():
                fill(place, own[key], f"prompt_encoder.{key}")
            return
        finished = needed(tensors, FILE_KEY)
        expected = self.eval_tokens()
        if finished.shape != expected.shape:
            raise ShapeError(f"{FILE_KEY}: the file has {list(finished.shape)}, the model {list(expected.shape)}")
        trained = any(parameter.requires_grad for parameter in self.parameters())
        self.network = None
        self.tokens = nn.Parameter(finished.to(expected), requires_grad=trained)


def needed(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor `key` of a file. Raises FormatError when it is missing."""
    if key not in tensors:
        raise FormatError(f"the adapter file lacks {key!r}; it has {sorted(tensors)}")
    return tensors[key]


@torch.no_grad()
def fill(place: Tensor, value: Tensor, key: str) -> None:
    """Copies `value`, the file's `key`, into `place`. Raises ShapeError when it does not fit."""
    if place.shape != value.shape:
        raise ShapeError(f"{key}: the file has {list(value.shape)}, the model has {list(place.shape)}")
    place.copy_(value)
