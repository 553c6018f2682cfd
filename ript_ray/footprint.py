"""What an update takes of its device's memory, told without having that memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ript_ray.algos.objectives import Draw, find_objective, traits_of
from ript_ray.config import Config, ObjectiveConfig
from ript_ray.errors import UserError
from ript_ray.policies.adapt import adapt, autocast
from ript_ray.policies.checkpoints import published_bytes
from ript_ray.policies.policy import Policy
from ript_ray.types import Batch

_FLOAT32 = 4
CUDA_BYTES = 0.6e9
"""CUDA's own, in each process."""
_ACTING_BYTES = 0.4e9
"""What one chunk takes while it is computed, and the renderer."""


def acting_footprint(policy: Policy, precision: str) -> dict[str, float]:
    """Bytes that a rollout actor takes of its GPU, by what takes them.

    Args:
        policy: of any size; its weights may be without memory.
        precision: ``policy.precision``.
    """
    weights = published_bytes(policy, precision)
    return {"weights": weights, "a chunk and the renderer": _ACTING_BYTES, "CUDA": CUDA_BYTES}


def check_gpu_share(policy: Policy, config: Config, gpu_bytes: float) -> None:
    """Is an actor's share of a GPU as large as what it takes of its memory? Ray deals out shares and looks at no bytes.

    Args:
        policy: of any size; its weights may be without memory.
        config: has the share.
        gpu_bytes: memory of the GPU.

    Raises:
        UserError: when actors with such shares would not fit together.
    """
    told, share = config.plan.actor_gpu_gb, config.scaling.actor_gpus
    needed = 1e9 * told if told is not None else sum(acting_footprint(policy, config.policy.precision).values())
    if needed > min(1.0, share) * gpu_bytes:
        raise UserError(
            f"scaling.actor_gpus={share:g} of a GPU of {gpu_bytes / 1e9:.1f} GB: an actor takes {needed / 1e9:.1f} GB "
            f"of it; set scaling.actor_gpus={math.ceil(100 * needed / gpu_bytes) / 100:g} or more, "
            "policy.precision=bfloat16 or int8, or correct plan.actor_gpu_gb"
        )


def update_footprint(policy: Policy, config: Config, cameras: int, state_dim: int, action_dim: int) -> dict[str, float]:
    """Bytes that `learner.update.update` takes at its peak, by what takes them.

    Args:
        policy: of any size; its weights may be without memory (``torch.device("meta")``). It is not changed.
        config: what is trained, how, and on how much at a time.
        cameras: C, of the environment's frames.
        state_dim: S.
        action_dim: A.
    """
    train, objective = config.train, config.objective
    policy = copy.deepcopy(policy)
    policy.without_numbers()
    adapt(policy, train)
    if train.checkpoint_activations:
        policy.checkpoint_activations()
    learners = max(1, config.scaling.learners)
    divided = train.shard and learners > 1
    share = 1 / learners if divided else 1.0
    weights = _bytes([*policy.parameters(), *policy.buffers()])
    trained = _bytes([p for p in policy.parameters() if p.requires_grad])
    references = traits_of(objective).compares_with_reference + (train.anchor > 0)
    copies = weights * references + (trained if train.ema > 0 else 0.0)
    # Divided weights are whole where they are needed: two blocks, since the next comes while one is computed, and what
    # belongs to no block, with the buffer in which it came; so are their gradients before they are exchanged.
    blocks = [_bytes([*block.parameters()]) for block in policy.shardable()]
    outside = weights - sum(blocks)
    at_once = outside + 2 * max(blocks, default=0.0)
    if traits_of(objective).compares_with_recording:  # it asks for what rollouts recorded, and keeps no more than this
        objective = ObjectiveConfig()
    rows = min(train.micro_batch, train.batch_size // learners)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = Batch(
            frames=torch.zeros(rows, cameras, config.env.image_size, config.env.image_size, 3, dtype=torch.uint8),
            states=torch.zeros(rows, state_dim),
            actions=torch.zeros(rows, 50, action_dim),
            valid=torch.ones(rows, 50, dtype=torch.bool),
            advantages=torch.ones(rows),
            weights=torch.ones(rows),
            versions=torch.zeros(rows, dtype=torch.int64),
            instructions=["pick up the black bowl between the plate and the ramekin"] * rows,
        )
        kept = _kept_for_the_backward_pass(policy.to_empty(device="cpu").train(), batch, config, objective)
    parts = {
        "weights": weights * share,
        "weights gathered": at_once + (1 + references) * outside if divided else 0.0,
        # Autocast keeps them between forward and backward pass.
        f"weights in {train.precision}": weights / 2 if train.precision != "float32" else 0.0,
        "copies to compare with or to average": copies * share,
        "gradients": trained * share,
        "gradients in exchange": min(trained, at_once) if divided else trained if learners > 1 else 0.0,
        "AdamW's two moments": 2 * trained * share,
        f"activations of {rows} windows": kept,
    }
    return {name: float(size) for name, size in parts.items() if size}


def _bytes(tensors: Sequence[torch.Tensor]) -> float:
    return float(_FLOAT32 * sum(tensor.numel() for tensor in tensors))


def _kept_for_the_backward_pass(policy: Policy, batch: Batch, config: Config, objective: ObjectiveConfig) -> float:
    """Bytes of all that one forward pass keeps, weights aside. With fake tensors it costs neither memory nor time."""
    own = {tensor.untyped_storage()._cdata for tensor in [*policy.parameters(), *policy.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    rows = len(batch)
    noise = torch.zeros(rows, policy.horizon, policy.action_dim)
    time = torch.full((rows,), 0.5)
    reference = copy.deepcopy(policy).requires_grad_(False) if traits_of(objective).compares_with_reference else None
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast("cpu", config.train),
    ):
        draw = Draw(policy, batch, noise, time, time, reference)
        loss = find_objective(objective.name)(draw, objective).per_sample.sum()
        if config.train.anchor > 0:  # the anchor's own pass has no gradients and keeps nothing, so any policy will do
            loss = loss + draw.change_since(policy).sum()
    del loss  # the graph lives until here
    return float(sum(storage.nbytes() for storage in kept.values()))
