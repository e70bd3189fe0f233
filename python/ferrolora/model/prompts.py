"""Virtual tokens in a model: making them, and putting them before what a forward pass or a generation is given."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ferrolora.adapters.config import TaskType
from ferrolora.adapters.multitask_prompt import MultitaskPromptTuningConfig
from ferrolora.adapters.prompt import PromptTuningConfig
from ferrolora.adapters.prompt_base import PromptEncoder, PromptLearningConfig, PromptStart
from ferrolora.adapters.registry import method_of
from ferrolora.errors import UnsupportedError
from ferrolora.model.kbit import is_checkpointing
from ferrolora.model.prefix_cache import make_cache

IGNORED = -100  # the label that transformers' losses leave out


def make_encoder(model: nn.Module, config: PromptLearningConfig) -> PromptEncoder:
    """The encoder of an adapter, float32, on the device of the model's embedding, not trained yet."""
    if config.gives_keys_and_values:
        _refuse_checkpointing(model)
    embedding = input_embedding(model)
    weight = cast(Tensor, embedding.weight)
    start = PromptStart(
        vocabulary=weight.shape[0],
        rows=lambda ids: embedding(ids.to(weight.device)),
        text=_text_ids(config),
        source=_source(config),
    )
    build = method_of(config.peft_type).encoder
    assert build is not None
    encoder = build(config, start)
    return encoder.to(weight.device).requires_grad_(False)


def input_embedding(model: nn.Module) -> nn.Module:
    """The model's input embedding. Raises UnsupportedError if the model does not name one."""
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if not isinstance(embedding, nn.Module):
        raise UnsupportedError("virtual tokens need a model that names its input embedding (get_input_embeddings)")
    return embedding


class Prompted:
    """A base model with the virtual tokens of one adapter.

    Args:
        model: the base.
        config: of the adapter, made concrete.
        encoder: makes the tokens.
    """

    def __init__(self, model: nn.Module, config: PromptLearningConfig, encoder: PromptEncoder) -> None:
        self.model, self.config, self.encoder = model, config, encoder
        self.count = config.num_virtual_tokens or 0
        self.is_decoded = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns. As in PEFT, outputs for the virtual tokens come before those of the input's."""
        bound = _bound(self.model, args, kwargs)
        task_ids = self._task_ids(bound)
        if self.config.gives_keys_and_values:
            _refuse_checkpointing(self.model, training=self.model.training)
            return self._with_cache(bound)
        inputs = self._embedded(bound, task_ids)
        if self.is_decoded:
            return self.model(**self._decoder_side(inputs, task_ids))
        return self.model(**self._labelled(inputs))

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """What the base's `generate` returns: the given tokens and the new ones, without the virtual ones."""
        ids = kwargs.pop("input_ids", inputs)
        if not isinstance(ids, Tensor):
            raise UnsupportedError("generate with virtual tokens needs input_ids")
        generate: Any = self.model.generate
        bound = {"input_ids": ids, "attention_mask": kwargs.pop("attention_mask", None)}
        task_ids = self._task_ids(kwargs)
        kwargs.pop("position_ids", None)
        kwargs.pop("token_type_ids", None)
        if not self.config.gives_keys_and_values:
            embedded = self._embedded(bound, task_ids)
            if not self.is_decoded:
                embedded["input_ids"] = ids  # beside the embeddings: what comes back begins with them
            return generate(**embedded, **kwargs)
        rows = ids.shape[0] * _copies(self.model, kwargs)
        cache = self._cache(rows)
        if self.is_decoded:
            return generate(ids, attention_mask=bound["attention_mask"], past_key_values=cache, **kwargs)
        # The cache stands for n tokens before the input: any ids hold their places, none of them is looked at.
        places = ids.new_zeros(ids.shape[0], self.count)
        mask = self._mask(bound["attention_mask"], ids)
        out = generate(torch.cat([places, ids], 1), attention_mask=mask, past_key_values=cache, **kwargs)
        return _without_places(out, self.count)

    # -- tokens before the embeddings ------------------------------------------------------------------------------

    def _embedded(self, bound: dict[str, Any], task_ids: Tensor | None) -> dict[str, Any]:
        """`bound` with embeddings instead of ids, the tokens before them, and a mask that covers both."""
        inputs = dict(bound)
        ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if embeds is None:
            embeds = input_embedding(self.model)(ids)
        tokens = self._tokens(embeds, task_ids)[:, : self.count]
        inputs["inputs_embeds"] = torch.cat([tokens, embeds], 1)
        inputs["attention_mask"] = self._mask(inputs.get("attention_mask"), embeds)
        inputs.pop("position_ids", None)  # they would not count the virtual tokens; the model makes its own
        types = inputs.get("token_type_ids")
        if types is not None:
            inputs["token_type_ids"] = torch.cat([types.new_zeros(len(types), self.count), types], 1)
        return inputs

    def _tokens(self, like: Tensor, task_ids: Tensor | None) -> Tensor:
        """[batch, n, dim] in the type and on the device of `like` [batch, …]."""
        tokens = self.encoder(task_ids)
        tokens = tokens if tokens.dim() == 3 else tokens[None].expand(like.shape[0], -1, -1)
        return cast(Tensor, tokens.to(like))

    def _mask(self, mask: Tensor | None, like: Tensor) -> Tensor:
        """[batch, n + length]: the virtual tokens are always attended to."""
        if mask is None:
            mask = torch.ones(like.shape[:2], dtype=torch.long, device=like.device)
        return torch.cat([mask.new_ones(len(mask), self.count), mask], 1)

    def _labelled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Labels, one for each token, get n that are left out; positions of answers move on by n."""
        labels = inputs.get("labels")
        each_token = self.config.task_type in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS, None)
        if isinstance(labels, Tensor) and labels.dim() == 2 and each_token:
            inputs["labels"] = _ignored_first(labels, self.count)
        for name in ("start_positions", "end_positions"):
            if isinstance(inputs.get(name), Tensor):
                inputs[name] = inputs[name] + self.count
        return inputs

    def _decoder_side(self, inputs: dict[str, Any], task_ids: Tensor | None) -> dict[str, Any]:
        """Multitask prompts stand before the decoder's input too, as in PEFT; the others before the encoder's only."""
        if not self.config.takes_task_ids or (self.config.num_transformer_submodules or 1) < 2:
            return inputs
        labels, ids = inputs.get("labels"), inputs.pop("decoder_input_ids", None)
        embeds = inputs.pop("decoder_inputs_embeds", None)
        if embeds is None:
            if ids is None and labels is not None:
                ids = self.model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
            embeds = input_embedding(self.model)(ids)
        tokens = self._tokens(embeds, task_ids)[:, self.count :]
        inputs["decoder_inputs_embeds"] = torch.cat([tokens, embeds], 1)
        if labels is not None:
            inputs["labels"] = _ignored_first(labels, self.count)
        if inputs.get("decoder_attention_mask") is not None:
            inputs["decoder_attention_mask"] = self._mask(inputs["decoder_attention_mask"], embeds)
        return inputs

    # -- keys and values -------------------------------------------------------------------------------------------

    def _with_cache(self, bound: dict[str, Any]) -> Any:
        source = bound.get("input_ids")
        source = bound["inputs_embeds"] if source is None else source
        cache = self._cache(source.shape[0])
        inputs = dict(bound)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + self.count
        if self.is_decoded:
            if inputs.get("decoder_attention_mask") is not None:
                inputs["decoder_attention_mask"] = self._mask(inputs["decoder_attention_mask"], source)
        else:
            inputs["attention_mask"] = self._mask(inputs.get("attention_mask"), source)
        if "past_key_values" in inspect.signature(self.model.forward).parameters:
            return self.model(**inputs, past_key_values=cache)
        with _cache_into(self._backbone(), cache):
            return self.model(**inputs)

    def _cache(self, rows: int) -> Any:
        like = cast(Tensor, input_embedding(self.model).weight)
        prefix = self.encoder(None).to(like.device, like.dtype)
        return make_cache(self.model, self.config, prefix[None].expand(rows, -1, -1), self.is_decoded)

    def _backbone(self) -> nn.Module:
        """The part of a model with a task head that takes a cache."""
        part = getattr(self.model, getattr(self.model, "base_model_prefix", "") or "-", None)
        if not isinstance(part, nn.Module) or "past_key_values" not in inspect.signature(part.forward).parameters:
            raise UnsupportedError(f"{type(self.model).__name__} takes no past_key_values, which prefix tuning needs")
        return part

    def _task_ids(self, given: dict[str, Any]) -> Tensor | None:
        task_ids = given.pop("task_ids", None)
        if self.config.takes_task_ids and task_ids is None:
            raise UnsupportedError("multitask prompt tuning needs task_ids [batch] in every batch")
        return cast("Tensor | None", task_ids)


@contextmanager
def _cache_into(backbone: nn.Module, cache: Any) -> Iterator[None]:
    """Within the context the backbone is called with `cache`; a head that does not know of it passes it by."""

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"past_key_values": cache}

    handle = backbone.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, without those that are None."""
    names = list(inspect.signature(model.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    return {name: value for name, value in given.items() if value is not None}


def _ignored_first(labels: Tensor, count: int) -> Tensor:
    return torch.cat([labels.new_full((len(labels), count), IGNORED), labels], 1)


def _copies(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How often generation repeats each row of the batch (beams, several answers)."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> int:
        return int(kwargs.get(name) or getattr(config, name, None) or 1)

    return max(asked("num_beams"), asked("num_return_sequences"))


def _without_places(out: Any, count: int) -> Any:
    if isinstance(out, Tensor):
        return out[:, count:]
    out.sequences = out.sequences[:, count:]
    return out


def _refuse_checkpointing(model: nn.Module, training: bool = True) -> None:
    if training and is_checkpointing(model):
        raise UnsupportedError(
            "prefix tuning does not go with gradient checkpointing, under which transformers drops the keys and values "
            "it is given. Call model.gradient_checkpointing_disable(), or use prompt tuning"
        )


def _text_ids(config: PromptLearningConfig) -> list[int] | None:
    if not isinstance(config, PromptTuningConfig) or config.prompt_tuning_init != "TEXT" or config.inference_mode:
        return None
    from transformers import AutoTokenizer

    options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    return list(tokenizer(config.prompt_tuning_init_text)["input_ids"])


def _source(config: PromptLearningConfig) -> Mapping[str, Tensor] | None:
    path = config.prompt_tuning_init_state_dict_path if isinstance(config, MultitaskPromptTuningConfig) else None
    if path is None or config.inference_mode:
        return None
    from safetensors.torch import load_file

    if Path(path).suffix == ".safetensors":
        return load_file(path)
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
