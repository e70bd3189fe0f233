"""Parameter counts in parameters, not in bytes: a packed weight counts what it stands for."""

from torch import nn

from ferrolora.nn import QuantExperts, QuantLinear


def logical_numel(model: nn.Module) -> dict[int, int]:
    """{id of a parameter: how many values it stands for}; of a packed weight its float shape's."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            counts[id(module.codes)] = module.out_features * module.in_features
        elif isinstance(module, QuantExperts):
            counts.update({id(module.get_parameter(name)): shape.numel() for name, shape in module.shapes.items()})
    return counts


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of `model`; a shared parameter counts once."""
    counts = logical_numel(model)
    trainable = sum(counts[id(parameter)] for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(counts.values())
