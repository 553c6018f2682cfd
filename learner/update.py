"""The update: micro-batches in, better weights out. No Ray here; supervised training uses the same loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ript_ray.algos.objectives import OBJECTIVES, weighted_loss
from ript_ray.config import TrainConfig
from ript_ray.policies.flow import FlowPolicy, sample_time, shift_images
from ript_ray.types import Batch

Load = Callable[[], Batch]
"""Gathers one micro-batch; called when its turn comes, so that only one is in memory."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step of one learner."""

    micro_batches: Sequence[Load]
    batch_size: int
    """Windows of all learners together, by which the loss is divided."""


class NonFinite(RuntimeError):
    """A loss or gradient became NaN or infinite; the weights were not touched by it."""


def update(
    policy: FlowPolicy,
    steps: Sequence[Step],
    config: TrainConfig,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Train ``policy`` in place on all ``steps``: AdamW, warm-up and cosine, accumulation, clipping.

    Args:
        policy: on its device, in float32.
        steps: what this learner does; every learner has the same number of steps.
        config: optimisation settings.
        generator: draws noise, times and image shifts, on the CPU.
        on_step: called after each step with its index and loss.

    Returns:
        Diagnostics: ``loss`` (mean of the last tenth of steps), ``loss_first`` (of the first), ``grad_norm`` (mean),
        ``pieces`` (how often each micro-batch had to be divided to fit into memory, 1 for not at all).

    Raises:
        NonFinite: before a NaN or an infinity could reach the weights.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    losses: list[float] = []
    norms: list[float] = []
    pieces = 1
    policy.train()
    for index, step in enumerate(steps):
        loss, pieces = _accumulate_that_fits(policy, step, config, generator, pieces)
        if dist.is_initialized() and dist.get_world_size() > 1:
            _sum_over_learners(parameters, loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise NonFinite(
                f"step {index}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}; try a lower train.lr "
                f"(now {config.lr}) or train.precision=float32"
            )
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(index, len(steps), config.lr, config.warmup)
        optimiser.step()
        losses.append(loss.item())
        norms.append(norm.item())
        if on_step is not None:
            on_step(index, losses[-1])
    policy.eval()
    tenth = max(1, len(losses) // 10)
    return {
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss": sum(losses[-tenth:]) / tenth,
        "grad_norm": sum(norms) / len(norms),
        "pieces": float(pieces),
    }


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first share ``warmup`` of ``steps``, then a cosine to zero."""
    rising = max(1, math.ceil(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _accumulate_that_fits(
    policy: FlowPolicy, step: Step, config: TrainConfig, generator: torch.Generator, pieces: int
) -> tuple[torch.Tensor, int]:
    """Accumulate the gradients of a step; when memory runs out, start the step again with smaller pieces.

    The noise is drawn again from the same state and losses are sums, so the gradients do not change beyond rounding.
    """
    state = generator.get_state()
    while True:
        try:
            policy.zero_grad(set_to_none=True)
            return _accumulate(policy, step, config, generator, pieces), pieces
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or pieces >= config.micro_batch:
                raise
        pieces *= 2
        generator.set_state(state)
        torch.cuda.empty_cache()


def _accumulate(
    policy: FlowPolicy, step: Step, config: TrainConfig, generator: torch.Generator, pieces: int
) -> torch.Tensor:
    device = next(policy.parameters()).device
    total = torch.zeros((), device=device)
    for load in step.micro_batches:
        batch = load()
        batch.frames = shift_images(batch.frames, config.image_shift, generator)
        noise = torch.randn(len(batch), policy.config.horizon, policy.config.action_dim, generator=generator)
        time = sample_time(len(batch), generator)
        size = -(-len(batch) // pieces)
        for start in range(0, len(batch), size):
            rows = slice(start, start + size)
            piece = batch[rows].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                errors = policy(piece, noise[rows].to(device), time[rows].to(device))
            weights = OBJECTIVES[config.objective](piece.advantages, config.alpha)
            loss = weighted_loss(errors[0].float(), errors[1].float(), piece.valid, weights) / step.batch_size
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    return total


def _sum_over_learners(parameters: list[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Sum gradients and the loss over all learners, as one buffer after accumulation.

    Not by hooks during the backward pass: a learner that had to divide a micro-batch would then take part in another
    number of collective operations than the others.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss.view(1), *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    loss.copy_(flat[0])
    offset = 1
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = flat[offset : offset + gradient.numel()].view_as(gradient)
        offset += gradient.numel()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
