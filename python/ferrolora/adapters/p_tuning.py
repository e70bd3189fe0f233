"""P-tuning: virtual tokens that a small network makes while they are trained."""

from dataclasses import dataclass

from torch import Tensor, nn

from ferrolora.adapters.config import PeftType
from ferrolora.adapters.prompt_base import PromptEncoder, PromptLearningConfig, PromptStart, Reparameterized
from ferrolora.errors import UnsupportedError

NETWORKS = ("MLP", "LSTM")


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Virtual tokens = network(embedding [n, dim]), before the input embeddings.

    Args:
        encoder_reparameterization_type: "MLP" (default: dim → hidden → hidden → dim with ReLU) or "LSTM"
            (bidirectional, then 2·hidden → 2·hidden → dim with ReLU).
        encoder_hidden_size: hidden; default None: `token_dim`.
        encoder_num_layers: layers of the LSTM. Default 2; an MLP has always three.
        encoder_dropout: between the layers of the LSTM. Default 0.

    The other fields are those of every method of virtual tokens.

    Raises:
        UnsupportedError: an unknown network.

    Source: arXiv 2103.10385.
    """

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        kind = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = str(getattr(kind, "value", kind))
        if self.encoder_reparameterization_type not in NETWORKS:
            raise UnsupportedError(
                f"PromptEncoderConfig(encoder_reparameterization_type={kind!r}) is unknown; choose one of {NETWORKS}"
            )


class _TokenNetwork(nn.Module):
    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        count, dim = config.sizes()
        hidden = config.encoder_hidden_size or dim
        self.embedding = nn.Embedding(count, dim)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                dim,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            wide = 2 * hidden
            self.mlp_head = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, dim))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
            )

    def forward(self) -> Tensor:
        tokens = self.embedding.weight[None]  # [1, n, dim]
        if self.lstm_head is not None:
            tokens = self.lstm_head(tokens)[0]
        made: Tensor = self.mlp_head(tokens)[0]
        return made


def build(config: PromptLearningConfig, start: PromptStart) -> PromptEncoder:
    """The encoder of P-tuning."""
    assert isinstance(config, PromptEncoderConfig)
    config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
    return Reparameterized(_TokenNetwork(config))
