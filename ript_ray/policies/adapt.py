"""Which weights an update trains, and in which arithmetic: all, some parts, or low-rank changes (LoRA) that are merged
at its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ript_ray.config import TrainConfig
from ript_ray.errors import UserError


class LoraLinear(nn.Linear):
    """W·x + B·A·x with W fixed and rank r (LoRA, arXiv 2106.09685, with α = r). B is zero at first.

    Its tensors are those of the linear layer that it replaces, and two more: after `merge_lora` nothing is left of it.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def autocast(device_type: str, train: TrainConfig) -> torch.autocast:
    """The arithmetic of an update's forward pass, as ``train.precision`` says."""
    return torch.autocast(device_type, getattr(torch, train.precision), enabled=train.precision != "float32")


def adapt(policy: nn.Module, train: TrainConfig) -> None:
    """Leave as trainable what ``train.freeze`` and ``train.lora_rank`` say.

    Raises:
        UserError: when the policy has no such parts, or nothing is left to train.
    """
    freeze(policy, train.freeze)
    if train.lora_rank:
        add_lora(policy, train.lora_rank, train.lora_part)


def freeze(policy: nn.Module, parts: Sequence[str]) -> None:
    """Exclude all weights whose names begin with one of ``parts`` from training.

    Raises:
        UserError: when there is no such part, or nothing else to train.
    """
    names = [name for name, _ in policy.named_parameters()]
    for part in parts:
        if not any(name.startswith(f"{part}.") for name in names):
            known = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise UserError(f"train.freeze={part!r}: the policy has no such part; it has {known}")
    for name, parameter in policy.named_parameters():
        if name.startswith(tuple(f"{part}." for part in parts)):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise UserError(f"train.freeze={','.join(parts)}: nothing is left to train")


def add_lora(policy: nn.Module, rank: int, part: str) -> None:
    """Train nothing but low-rank changes of the linear layers of a part, and the condition.

    A converted policy has not learnt yet what tells "good" from "bad": without the condition they would stay the same.

    Args:
        policy: changed in place.
        rank: r.
        part: prefix of names, such as ``expert``; ``all`` for everything.

    Raises:
        UserError: when the part has no linear layer that is trained.
    """
    chosen = [
        module
        for name, module in policy.named_modules()
        if type(module) is nn.Linear
        and module.weight.requires_grad
        and (part == "all" or f"{name}.".startswith(f"{part}."))
    ]
    if not chosen:
        raise UserError(f"train.lora_part={part!r}: no linear layer to train there; 'all' takes every part")
    condition = [p for name, p in policy.named_parameters() if name.startswith("condition.") and p.requires_grad]
    policy.requires_grad_(False)
    for parameter in condition:
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)  # the same for all learners
    for module in chosen:
        weight = module.weight
        bound = 1 / math.sqrt(module.in_features)
        start = (2 * torch.rand(rank, module.in_features, generator=generator) - 1) * bound
        module.__class__ = LoraLinear
        module.register_parameter("lora_a", nn.Parameter(start.to(weight)))
        module.register_parameter("lora_b", nn.Parameter(weight.new_zeros(module.out_features, rank)))


@torch.no_grad()
def merge_lora(policy: nn.Module) -> None:
    """Make the changes part of the weights."""
    for module in policy.modules():
        if isinstance(module, LoraLinear):
            module.weight += module.lora_b @ module.lora_a
            del module.lora_a, module.lora_b
            module.__class__ = nn.Linear  # type: ignore[assignment]
