"""Objectives: how much each sample counts in the conditional and in the unconditional branch.

Both branches are squared velocity errors with shared noise and time, ℓ(c = 1) and ℓ(c = 0). An objective is the
weighted mean  mean[ w₁(A)·ℓ(c = 1) + w₀(A)·ℓ(c = 0) ]  over samples, valid steps and action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Weights = tuple[torch.Tensor, torch.Tensor]
Objective = Callable[[torch.Tensor, float], Weights]
"""(advantages float32[B], α) → (w₁ float32[B], w₀ float32[B])"""


def cfg(advantages: torch.Tensor, alpha: float) -> Weights:
    """Classifier-free guidance: 1{A > 0} and α (CFGRL, arXiv 2505.23458, dual branch)."""
    return (advantages > 0).float(), torch.full_like(advantages, alpha)


def imitation(advantages: torch.Tensor, alpha: float) -> Weights:
    """Imitation of every sample whatever its advantage: supervised learning, and the control of experiments."""
    return torch.ones_like(advantages), torch.full_like(advantages, alpha)


OBJECTIVES: dict[str, Objective] = {"cfg": cfg, "imitation": imitation}


def weighted_loss(
    conditional: torch.Tensor, unconditional: torch.Tensor, valid: torch.Tensor, weights: Weights
) -> torch.Tensor:
    """Sum over samples of the weighted mean error of a sample: a scalar.

    A sum, so that micro-batches add up to the batch whatever their sizes; the caller divides by the batch size.

    Args:
        conditional: squared errors at c = 1, float32[B, T, D].
        unconditional: squared errors at c = 0, same shape.
        valid: bool[B, T]; padded steps do not count.
        weights: from an objective.
    """
    steps = valid.float()
    share = steps / steps.sum(1, keepdim=True).clamp_min(1.0)
    per_sample = [(errors.mean(-1) * share).sum(1) for errors in (conditional, unconditional)]
    return (weights[0] * per_sample[0] + weights[1] * per_sample[1]).sum()
