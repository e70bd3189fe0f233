"""AdaLoRA's allocation over a whole model."""

from typing import TYPE_CHECKING

from ferrolora.adapters.adalora import AdaLoraConfig, AdaLoraLayer
from ferrolora.adapters.adalora_allocator import RankAllocator

if TYPE_CHECKING:
    from ferrolora.model.peft_model import PeftModel


def update_and_allocate(model: "PeftModel", step: int) -> None:
    """Lets the allocator of each active AdaLoRA adapter observe the gradients of optimizer step `step` (from 1)."""
    for name in model.active_adapters:
        config = model.peft_config[name]
        if not isinstance(config, AdaLoraConfig):
            continue
        if name not in model._allocators:
            layers = {
                path: layer
                for path, layer in model.get_base_model().named_modules()
                if isinstance(layer, AdaLoraLayer) and name in layer.adapter_names()
            }
            model._allocators[name] = RankAllocator(layers, config, name)
        model._allocators[name].step(step)
