"""Learners that share one policy among them: each holds a part of the weights, the gradients and AdamW's moments.

FSDP2 (``torch.distributed.fsdp.fully_shard``): the weights of one block at a time are gathered where it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ript_ray.policies.policy import Policy


def shard(policy: Policy, mesh: DeviceMesh) -> Policy:
    """Divide a policy among the learners of ``mesh``, in place and for good; gradients add up over them.

    Args:
        policy: the same for all learners, on any device; each takes its part to the mesh's device.
        mesh: one-dimensional.
    """
    for module in [*policy.shardable(), policy]:
        divided = fully_shard(module, mesh=mesh)
        # Losses are divided by the whole batch's size already, so the sum is the mean.
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(True)
    for method in ("encode", "conditioned", "velocity"):
        register_fsdp_forward_method(policy, method)
    return policy


def is_divided(policy: Policy) -> bool:
    """Has `shard` been here?"""
    return isinstance(policy, FSDPModule)


@torch.no_grad()
def copy_whole(tensors: Sequence[torch.Tensor], into: Sequence[nn.Parameter]) -> None:
    """Copy tensors into a policy's parameters; where they are divided all learners must do it together.

    Args:
        tensors: divided among learners, or not.
        into: parameters of the same shapes, on any device.
    """
    for source, target in zip(tensors, into, strict=True):
        target.copy_(whole(source))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; one that is divided is gathered from all learners."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
