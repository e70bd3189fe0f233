"""Parameter counts in parameters, not in bytes: a packed weight counts what it stands for."""

from torch import nn


def logical_numel(model: nn.Module) -> dict[int, int]:
    """{id of a parameter: how many values it stands for}; out·in for the packed weight of a linear layer."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            counts[id(module.weight)] = module.out_features * module.in_features
    return counts


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of `model`; a shared parameter counts once."""
    counts = logical_numel(model)
    trainable = sum(counts[id(parameter)] for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(counts.values())
