"""Finds weights that are NaN or infinite, in one pass over them with one wait for each device."""

from __future__ import annotations

from collections import defaultdict

import torch

from trl_fast.ops.validation import NotFiniteError
from trl_fast.parallel.weights import local_shard

from .low_bit_layers import holds_packed_numbers


def not_finite(model: torch.nn.Module) -> list[str]:
    """Returns the names of the parameters that hold NaN or infinity; of sharded ones, as far as they are here.

    Parameters without data (on the meta device, or of other processes) and quantized ones are left out.
    """
    names, ends = defaultdict(list), defaultdict(list)
    packed = {id(module.weight) for module in model.modules() if holds_packed_numbers(module)}
    for name, parameter in model.named_parameters():
        weight = local_shard(parameter)
        if id(parameter) in packed or not weight.is_floating_point() or not weight.numel() or weight.is_meta:
            continue
        # Least and largest value: NaN is passed on, and there is no second tensor of the weight's size. 8-bit floats
        # lack the operation.
        weight = weight.to(torch.bfloat16) if weight.element_size() == 1 else weight
        names[weight.device].append(name)
        ends[weight.device].append(torch.stack(torch.aminmax(weight)).double())
    found = []
    for device, values in ends.items():
        finite = torch.stack(values).isfinite().all(dim=1).tolist()
        found += [name for name, good in zip(names[device], finite, strict=True) if not good]
    return found


def check_weights(model: torch.nn.Module, where: str) -> None:
    """Checks that a model's weights, adapters included, are numbers. `where`: what it came from, for the message.

    Raises:
        NotFiniteError: naming how many parameters hold NaN or infinity, and the first of them.
    """
    found = not_finite(model)
    if found:
        raise NotFiniteError(
            f"{where}: {len(found)} parameters hold NaN or infinity, first {found[0]!r}; these weights are broken: "
            "load a file that is whole, or a checkpoint from before the training that made it diverged"
        )
