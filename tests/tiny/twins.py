"""What each method means, in plain torch over a float weight: the oracle of layer outputs and gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]


def lora(x: Tensor, w: Tensor, bias: Tensor | None, p: Parameters, scaling: float) -> Tensor:
    return F.linear(x, w + scaling * p["lora_B.weight"] @ p["lora_A.weight"], bias)


def dora(x: Tensor, w: Tensor, bias: Tensor | None, p: Parameters, scaling: float) -> Tensor:
    moved = w + scaling * p["lora_B.weight"] @ p["lora_A.weight"]
    norms = torch.linalg.norm(moved, dim=1).detach()
    y = F.linear(x, moved) * (p["lora_magnitude_vector"] / norms)
    return y if bias is None else y + bias


def ia3(x: Tensor, w: Tensor, bias: Tensor | None, p: Parameters, scaling: float) -> Tensor:
    return F.linear(x, w, bias) * p["ia3_l"].flatten()


def ia3_feedforward(x: Tensor, w: Tensor, bias: Tensor | None, p: Parameters, scaling: float) -> Tensor:
    return F.linear(x * p["ia3_l"].flatten(), w, bias)


def loha(x: Tensor, w: Tensor, bias: Tensor | None, p: Parameters, scaling: float) -> Tensor:
    delta = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    return F.linear(x, w + scaling * delta, bias)


def adalora(x: Tensor, w: Tensor, bias: Tensor | None, p: Parameters, scaling: float) -> Tensor:
    return F.linear(x, w + scaling * p["lora_B"] @ (p["lora_A"] * p["lora_E"]), bias)
