"""AdaLoRA's allocation: which singular values of which modules are kept."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ferrolora.adapters.adalora import AdaLoraConfig, AdaLoraLayer
from ferrolora.errors import UnsupportedError


class RankAllocator:
    """Keeps the importance of every parameter and prunes singular values to the budget of the moment.

    importance(w) = Ī·Ū, where I = |w·∂L/∂w|, Ī ← β₁·Ī + (1−β₁)·I and Ū ← β₂·Ū + (1−β₂)·|I − Ī|. A singular value
    scores its own importance plus the mean importance of its row of A and of its column of B.

    Args:
        layers: the AdaLoRA layers of the model by path; all have adapter `name`.
        config: of the adapter; its `rank_pattern` is written.
        name: of the adapter.

    Source: AdaLoRA, arXiv 2303.10512, sections 3.2 and 3.3, algorithm 1.
    """

    def __init__(self, layers: Mapping[str, AdaLoraLayer], config: AdaLoraConfig, name: str) -> None:
        self.layers = dict(layers)
        self.config = config
        self.name = name
        self.start: int = sum(layer.entries("lora_E")[name].shape[0] for layer in self.layers.values())
        self.target = config.target_r * len(self.layers)
        self._sensitivity: dict[tuple[str, str], Tensor] = {}
        self._uncertainty: dict[tuple[str, str], Tensor] = {}

    def budget(self, step: int) -> int:
        """How many singular values the whole model may keep at optimizer step `step`, counted from 1: a cubic fall."""
        config = self.config
        assert config.total_step is not None
        last = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.start
        if step >= last:
            return self.target
        left = 1 - (step - config.tinit) / (last - config.tinit)
        return self.target + int((self.start - self.target) * left**3)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """To be called after the optimizer's step `step` (counted from 1) and before its gradients are cleared.

        Raises:
            UnsupportedError: a parameter of the adapter has no gradient.
        """
        config = self.config
        assert config.total_step is not None
        last = config.total_step - config.tfinal
        if step < last or not self._sensitivity:
            self._observe()
        if step == last or (config.tinit < step < last and step % config.deltaT == 0):
            config.rank_pattern = self._prune(self.budget(step))
        elif step > last and config.rank_pattern:
            self._hold(config.rank_pattern)

    def _observe(self) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        for path, layer in self.layers.items():
            for container in layer.containers:
                parameter = layer.entries(container)[self.name]
                if parameter.grad is None:
                    raise UnsupportedError(
                        f"{path}.{container} has no gradient: call the allocation between backward() and zero_grad()"
                    )
                key, now = (path, container), (parameter * parameter.grad).abs()
                mean = self._sensitivity.get(key, torch.zeros_like(now))
                spread = self._uncertainty.get(key, torch.zeros_like(now))
                self._sensitivity[key] = mean = beta1 * mean + (1 - beta1) * now
                self._uncertainty[key] = beta2 * spread + (1 - beta2) * (now - mean).abs()

    def _scores(self, path: str) -> Tensor:
        """[r], one for each singular value of a module."""
        a, b, e = (
            self._sensitivity[path, part] * self._uncertainty[path, part] for part in ("lora_A", "lora_B", "lora_E")
        )
        return e.flatten() + a.mean(1) + b.mean(0)

    def _prune(self, budget: int) -> dict[str, list[bool]]:
        scores = {path: self._scores(path) for path in self.layers}
        surplus = self.start - budget
        everything = torch.cat([score.cpu() for score in scores.values()])
        threshold = torch.kthvalue(everything, surplus).values if surplus > 0 else torch.tensor(-1.0)
        pattern = {}
        for path, score in scores.items():
            kept = score > threshold.to(score.device)
            self.layers[path].entries("lora_E")[self.name].masked_fill_(~kept[:, None], 0.0)
            pattern[f"{path}.lora_E"] = kept.tolist()
        return pattern

    def _hold(self, pattern: Mapping[str, list[bool]]) -> None:
        for path, layer in self.layers.items():
            values = layer.entries("lora_E")[self.name]
            kept = torch.tensor(pattern[f"{path}.lora_E"], device=values.device)
            if len(kept) == len(values):  # a loaded adapter holds the kept ones only
                values.masked_fill_(~kept[:, None], 0.0)
