"""Weights of eight bits for policies that only act: linear layers take a quarter of float32's bytes.

Each row of a linear layer's weights is int8 times one number, the row's largest magnitude over 127 (symmetric rounding
to nearest, as in LLM.int8(), arXiv 2208.07339, without its outliers). Inputs stay what they are.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

from ript_ray.policies.policy import Policy

FACTOR = "factor"
"""Name of the tensor beside a layer's weights."""


class Int8Linear(nn.Module):
    """A linear layer for inference.

    Args:
        inputs: I.
        outputs: O.
        bias: is one added?
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer(FACTOR, torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    weight: torch.Tensor
    factor: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.factor.to(x.dtype)
        return y if self.bias is None else y + self.bias


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float[O, I] as int8[O, I] and their factors float32[O]."""
    factor = weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / factor[:, None]).round().to(torch.int8), factor


def roundable(policy: Policy) -> set[str]:
    """Names of the linear layers that may have eight bits: those of the blocks that are only ever called."""
    inside = {module for block in policy.shardable() for module in block.modules()}
    return {
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and module in inside and not policy.keeps_exact(f"{name}.weight")
    }


def take_int8(policy: Policy, names: Collection[str]) -> None:
    """Make these linear layers of a policy `Int8Linear`, whose tensors are yet to be loaded."""
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = policy.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is no linear layer, so its weights cannot be int8")
        with torch.device(layer.weight.device):
            new = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None)
        setattr(policy.get_submodule(parent), own, new)
