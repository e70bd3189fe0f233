"""`PeftModel`: a model with adapters."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ferrolora.adapters.adalora_allocator import RankAllocator
from ferrolora.adapters.base import AdapterLayer, check_adapter_name
from ferrolora.adapters.config import ModuleConfig, PeftConfig
from ferrolora.adapters.prompt_base import PromptLearningConfig
from ferrolora.adapters.registry import method_of
from ferrolora.adapters.reversible import ReversibleConfig
from ferrolora.adapters.rows import BASE
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.model import allocation, files, hotswap, inject, merge, prompts, weighted
from ferrolora.model.config import config_for
from ferrolora.model.count import count_parameters
from ferrolora.model.float_weights import FloatWeights
from ferrolora.model.kbit import is_checkpointing, require_input_grads
from ferrolora.model.pretrained import surface_class
from ferrolora.model.reversible import inject_stack
from ferrolora.model.state_dict import LoadResult, get_peft_model_state_dict, prompt_encoder

# What the class itself must have before anything is looked up on the base: not there yet while unpickling.
_OWN = ("base_model", "prompt_encoder", "peft_config", "active_adapters", "_allocators", "_adapters_enabled")


class PeftModel(nn.Module):
    """A base model with named adapters in it. Only active adapters are trained; the base is frozen.

    What is not defined here is looked up on the base model (`generate`, `config`, `device`, …). Over a transformers
    model it is a `transformers.PreTrainedModel` too.

    Args:
        model: the base; its targeted modules are wrapped in place.
        peft_config: which adapter; copied, not changed.
        adapter_name: default "default".
        autocast_adapter_dtype: adapter weights are at least float32 (default True), else of the base's type.
        float_weights: where initializers that start from the float weight of a packed base find it: a directory of
            safetensors, or a mapping. Default None: the directory that the base was loaded from.

    Raises:
        TargetError: the configuration matches no module, or one that cannot be adapted.
    """

    _hf_peft_config_loaded: ClassVar[bool] = True  # by this mark Trainer accepts a quantized model for training

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> "PeftModel":
        return cast(PeftModel, object.__new__(surface_class(cls, model)))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        float_weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # PreTrainedModel's own would build a model from a configuration
        if isinstance(model, PeftModel) or any(inject.wrappers(model)):
            raise UnsupportedError("the model has adapters already; add another with its add_adapter()")
        self.base_model = inject.AdaptedModel(model)
        self.prompt_encoder = nn.ModuleDict()  # of adapters with virtual tokens
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        self._adapters_enabled = True
        self._allocators: dict[str, RankAllocator] = {}
        self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype, float_weights)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        inject.train_only_adapters(model)
        self._activate([adapter_name], not peft_config.inference_mode)
        if is_checkpointing(model):
            require_input_grads(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the base model returns, with the active adapters."""
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        prompted = self._prompted()
        run: Callable[..., Any] = self.base_model if prompted is None else prompted.forward
        with self._rows(kwargs.pop("adapter_names", None)):
            passes = self._passes() if self.training else None
            output = run(*args, **kwargs) if passes is None else passes(lambda: run(*args, **kwargs), kwargs)
        return self._with_penalty(output) if self.training else output

    def _passes(self) -> Callable[[Callable[[], Any], Mapping[str, Any]], Any] | None:
        """How the active method runs a training pass, if it has a way of its own."""
        for name in self.active_adapters:
            config = self.peft_config[name]
            passes = method_of(config.peft_type).passes
            if passes is not None:
                return lambda run, inputs: passes(run, self._layers(), name, config, inputs)
        return None

    def _with_penalty(self, output: Any) -> Any:
        """Adds what the active methods want added to a training loss."""
        for name in self.active_adapters:
            config = self.peft_config[name]
            penalty = method_of(config.peft_type).penalty
            if penalty is not None and isinstance(getattr(output, "loss", None), Tensor):
                extra = penalty(self._layers(), name, config)
                output.loss = output.loss if extra is None else output.loss + extra
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the base model's `generate` returns, with the active adapters.

        `adapter_names=[…]` gives each row of the batch its own adapter, as in a forward pass.
        """
        prompted = self._prompted()
        with self._rows(kwargs.pop("adapter_names", None)):
            if prompted is not None:
                return prompted.generate(*args, **kwargs)
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def _prompted(self) -> prompts.Prompted | None:
        """The base with the virtual tokens of the active adapter that has some."""
        for name in self.active_adapters:
            config = self.peft_config[name]
            if isinstance(config, PromptLearningConfig) and self._adapters_enabled:
                return prompts.Prompted(self.get_base_model(), config, prompt_encoder(self, name))
        return None

    @contextmanager
    def _rows(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        self._known([name for name in adapter_names if name != BASE])
        self._refuse_merged("mixing adapters in a batch")
        with inject.row_adapters(self.get_base_model(), adapter_names):
            yield

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN:
                raise
            return getattr(self._modules["base_model"], name)

    def get_base_model(self) -> nn.Module:
        """The model inside, with its wrappers."""
        base: nn.Module = self._modules["base_model"].model  # type: ignore[union-attr, assignment]
        return base

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str:
        """The first active adapter. Raises TargetError when there is none."""
        if not self.active_adapters:
            raise TargetError(f"no adapter is active; the model has {sorted(self.peft_config)}")
        return self.active_adapters[0]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        autocast_adapter_dtype: bool = True,
        float_weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a new adapter, inactive and frozen; `set_adapter` makes it count. Arguments as for the class.

        Raises:
            TargetError: the name is taken, or the configuration matches nothing.
            UnsupportedError: an adapter that trains biases, beside another: the biases are shared; or a merged model.
        """
        if adapter_name in self.peft_config:
            raise TargetError(f"the model has an adapter {adapter_name!r} already")
        if not isinstance(peft_config, (ModuleConfig, PromptLearningConfig, ReversibleConfig)):
            raise UnsupportedError(f"{type(peft_config).__name__} is not the configuration of a supported method")
        biased = [
            config for config in (*self.peft_config.values(), peft_config) if inject.bias_choice(config) != "none"
        ]
        if biased and self.peft_config:
            raise UnsupportedError(
                "an adapter with bias != 'none' trains the base's biases, so it must be the only one"
            )
        model = self.get_base_model()
        config = config_for(model, peft_config)
        if isinstance(config, PromptLearningConfig):
            check_adapter_name(adapter_name)
            self.prompt_encoder[adapter_name] = prompts.make_encoder(model, config)
            inject.inject_saved_modules(model, adapter_name, config.modules_to_save)
        elif isinstance(config, ReversibleConfig):
            inject_stack(model, adapter_name, config)
        else:
            weights = FloatWeights(model, float_weights)
            inject.inject_adapter(model, adapter_name, config, autocast_adapter_dtype, weights)
        self.peft_config[adapter_name] = config
        trainable = [p.requires_grad for p in self._parameters_of(self.active_adapters)]
        self._activate(self.active_adapters, any(trainable))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or several whose deltas add up, the active ones.

        Args:
            adapter_name: a name, or a list of names.
            inference_mode: keep them frozen. Default False: they are trained.

        Raises:
            TargetError: an unknown name.
            UnsupportedError: adapters are merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(names)
        self._refuse_merged("setting another adapter")
        if sum(self.peft_config[name].is_prompt_learning for name in names) > 1:
            raise UnsupportedError(f"{names}: only one adapter with virtual tokens can be active")
        self._activate(names, not inference_mode)
        self.active_adapters = names

    def _activate(self, names: Sequence[str], trainable: bool) -> None:
        inject.activate(self.get_base_model(), names, self.peft_config, trainable)
        for name, encoder in self.prompt_encoder.items():
            encoder.requires_grad_(trainable and name in names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first that is left becomes active."""
        self._known([adapter_name])
        self._refuse_merged("deleting one")
        for _, layer in inject.wrappers(self.get_base_model()):
            layer.delete_adapter(adapter_name)
        if adapter_name in self.prompt_encoder:
            del self.prompt_encoder[adapter_name]
        del self.peft_config[adapter_name]
        self._allocators.pop(adapter_name, None)
        left = [name for name in self.active_adapters if name != adapter_name]
        self.set_adapter(left or list(self.peft_config)[:1])

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds a LoRA adapter that combines others, inactive and frozen; numbers as in PEFT.

        Args:
            adapters: names of plain LoRA adapters (no DoRA, no biases, no fully trained modules).
            weights: one each.
            adapter_name: of the new adapter; its scaling is 1.
            combination_type: "linear" (A and B each for itself, equal ranks), "cat" (exact, ranks add up), "svd"
                (default: the best rank-`svd_rank` approximation of Σ w·ΔW), "ties", "dare_linear", "dare_ties",
                "magnitude_prune", and these four with "_svd" (on ΔW instead of on A and B).
            svd_rank: default None: the largest rank.
            density: share of values kept, for the four.
            majority_sign_method: "total" (default) or "frequency", for TIES.

        Raises:
            UnsupportedError: an adapter or a combination that cannot be; the message says why.
        """
        self._known(adapters)
        weighted.add_weighted_adapter(
            self, adapters, weights, adapter_name, combination_type, svd_rank, density, majority_sign_method
        )

    def hotswap_adapter(self, model_id: str | PathLike[str], adapter_name: str = "default", **hub: Any) -> None:
        """Puts a saved plain LoRA adapter in the place of adapter `adapter_name`: no module is added or replaced.

        Modules that the new one does not adapt get zeros; one that has no place here is refused.
        """
        self._known([adapter_name])
        self._refuse_merged("swapping an adapter")
        hotswap.hotswap_adapter(self, files.locate(model_id, **hub), adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model is the base. A merge is undone at the start and done again at the end."""
        merged = self._merged()
        self.unmerge_adapter()
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)
            if merged:
                self.merge_adapter(merged)

    def update_and_allocate(self, global_step: int) -> None:
        """Moves AdaLoRA's ranks; call it after the optimizer's step `global_step` (from 1) and before `zero_grad()`.

        With transformers' Trainer `ferrolora.train.callbacks.AdaLoraCallback` calls it.
        """
        allocation.update_and_allocate(self, global_step)

    def _enable(self, enabled: bool) -> None:
        self._adapters_enabled = enabled
        inject.enable(self.get_base_model(), enabled, self.peft_config)

    # -- counting --------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a packed weight counts the parameters it stands for."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints `trainable params: 2359296 || all params: 1231940608 || trainable%: 0.1915`."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable} || all params: {total} || trainable%: {share:.4f}")  # noqa: T201

    # -- merging ---------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Merges adapters (default: the active ones) in place; `unmerge_adapter` undoes it bit for bit.

        A float weight is replaced by W + Σ ΔW and kept aside; beside a packed weight the deltas are frozen as they are.
        """
        names = self._mergeable(adapter_names)
        for layer in self._layers():
            layer.merge(names)

    def unmerge_adapter(self) -> None:
        """Puts every base weight back exactly as it was before `merge_adapter`."""
        for layer in self._layers():
            layer.unmerge()

    def merge_and_unload(
        self, dtype: torch.dtype | None = None, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with W + Σ ΔW in ordinary float layers, and no adapter. The model is used up.

        Args:
            dtype: float16, bfloat16 or float32 for the whole result. Default None: a float model keeps its own; a
                model with packed weights becomes 16-bit (bfloat16 unless it computes in float16), which is what
                training saw up to rounding.
            adapter_names: which adapters. Default None: the active ones.
        """
        if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
            raise UnsupportedError(f"merge_and_unload(dtype={dtype}): choose torch.float16, bfloat16 or float32")
        names = self._mergeable(adapter_names)
        self.unmerge_adapter()
        return merge.merge_and_unload(self.get_base_model(), names, dtype)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters. The model is used up."""
        self.unmerge_adapter()
        return merge.unload(self.get_base_model())

    # -- files -----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Writes adapters in PEFT's format: "default" into the directory itself, others into a subfolder each.

        In a folder `checkpoint-<step>` the adapters are written once more as `model.safetensors`, under their names
        in memory: that is the file `transformers.Trainer` resumes from and takes the best model from.

        Args:
            save_directory: created if need be.
            selected_adapters: which. Default None: all.
            save_embedding_layers: also the input embedding and the output head. Default "auto": if the vocabulary
                differs from that of the base on disk.
            is_main_process: False writes nothing.
            state_dict: the model's state dict, if it was gathered from shards.
        """
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._known(names)
        if is_main_process:
            files.save(self, save_directory, names, save_embedding_layers, state_dict)

    def create_or_update_model_card(self, output_dir: str | PathLike[str]) -> None:
        """Writes README.md if there is none; Trainer calls this after writing its own."""
        files.save_card(self, output_dir)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes, as one commit; returns its URL. Needs huggingface_hub.

        Args:
            repo_id: `owner/name`; created if need be.
            **options: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`.
        """
        return files.upload(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        float_weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
        **hub: Any,
    ) -> "PeftModel":
        """Puts a saved adapter into `model`.

        Args:
            model: the base model; its targeted modules are wrapped in place.
            model_id: a directory, or a repository on the Hub.
            adapter_name: its name in memory. Default "default".
            is_trainable: train it further. Default False: frozen, and in evaluation mode.
            config: used instead of the file's. Default None.
            autocast_adapter_dtype: as for the class.
            float_weights: as for the class.
            **hub: `subfolder`, `revision`, `token`, `cache_dir`.

        Raises:
            FormatError: the files do not fit each other or the model.
        """
        from ferrolora.model.tasks import task_class  # its classes are subclasses of this one

        directory = files.locate(model_id, **hub)
        config = copy.copy(config) if config is not None else files.load_config(directory, is_trainable)
        config.inference_mode = not is_trainable
        made = task_class(config, cls)(model, config, adapter_name, autocast_adapter_dtype, float_weights)
        files.load(made, directory, adapter_name)
        return made if is_trainable else made.eval()

    def load_adapter(
        self,
        model_id: str | PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **hub: Any,
    ) -> LoadResult:
        """Reads a saved adapter into `adapter_name`, which is added, inactive, if the model does not have it.

        Args and errors: as `from_pretrained`. The result is empty: what does not fit raises.
        """
        directory = files.locate(model_id, **hub)
        self._refuse_merged("loading an adapter")
        if adapter_name not in self.peft_config:
            self.add_adapter(adapter_name, files.load_config(directory, is_trainable), autocast_adapter_dtype)
        result = files.load(self, directory, adapter_name)
        if is_trainable:
            for parameter in self._parameters_of([adapter_name]):
                parameter.requires_grad_(True)
        else:
            self.eval()
        return result

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of one adapter (default: the active one) by their keys in a file."""
        return get_peft_model_state_dict(self, state_dict, adapter_name or self.active_adapter)

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """What a checkpoint leaves out: everything that is in no adapter. Trainer expects it to be missing."""
        places = set(files.adapter_places(self))
        return [key for key in self.state_dict() if key not in places]

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the base tied its weights when it was loaded, and a trained head must not be tied again."""

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _layers(self) -> list[AdapterLayer]:
        return [layer for _, layer in inject.wrappers(self) if isinstance(layer, AdapterLayer)]

    def _merged(self) -> list[str]:
        return list(dict.fromkeys(name for layer in self._layers() for name in layer.merged_adapters))

    def _refuse_merged(self, what: str) -> None:
        if self._merged():
            raise UnsupportedError(f"{self._merged()} are merged; call unmerge_adapter() before {what}")

    def _mergeable(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        for name in names:
            if self.peft_config[name].is_prompt_learning:
                raise UnsupportedError(f"adapter {name!r} has virtual tokens, which have no place in a weight")
        return names

    def _parameters_of(self, names: Sequence[str]) -> list[nn.Parameter]:
        inside = [p for _, layer in inject.wrappers(self) for name in names for p in layer.adapter_parameters(name)]
        return inside + [
            p for name in names if name in self.prompt_encoder for p in self.prompt_encoder[name].parameters()
        ]

    def _known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise TargetError(f"the model has no adapter {unknown[0]!r}; it has {sorted(self.peft_config)}")
