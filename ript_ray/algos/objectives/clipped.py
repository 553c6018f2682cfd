"""The clipped surrogate of proximal policy optimisation."""

from __future__ import annotations

import torch

from ript_ray.algos.objectives.draw import Loss

_LOG_LIMIT = 20.0
"""Beyond it the ratio would overflow; it is clipped long before."""


def clipped_surrogate(log_ratio: torch.Tensor, advantages: torch.Tensor, clip: float) -> Loss:
    """−min(ρA, clip(ρ, 1 − ε, 1 + ε)A) (PPO, arXiv 1707.06347, equation 7).

    Args:
        log_ratio: ln ρ, float32[B].
        advantages: A, float32[B].
        clip: ε.
    """
    ratio = log_ratio.clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return Loss(-surrogate, {"ratio": ratio.detach(), "clipped": ((ratio - 1).abs() > clip).float()})
