"""Flow matching weighted by processed advantages."""

from __future__ import annotations

import torch

from ript_ray.algos.objectives.draw import Draw, Loss
from ript_ray.config import ObjectiveConfig


def advantage_weighted(draw: Draw, settings: ObjectiveConfig) -> Loss:
    """f(A)·ℓ(c = 1) + α·ℓ(c = 0); f is chosen by ``objective.negatives`` (AWR, arXiv 1910.00177, for f = exp).

    A negative weight times a loss is unbounded below: its gradient grows with the error that it creates, and the policy
    runs away. So every f but ``keep`` is bounded: non-negative weights, or with ``hinge`` A·min(ℓ, ℓ_old + margin),
    whose gradient ends once the error of a bad sample has grown by the margin. ``keep`` is there to show the trouble.
    """
    conditional, unconditional = (draw.mean(draw.errors(v)) for v in draw.velocity(1, 0))
    weights, counted = draw.batch.weights, conditional
    if settings.negatives == "hinge":
        (old,) = draw.reference_velocity(1)
        ceiling = draw.mean(draw.errors(old)) + settings.margin
        counted = torch.where(weights < 0, torch.minimum(conditional, ceiling), conditional)
    return Loss(
        weights * counted + settings.alpha * unconditional,
        {"conditional": conditional.detach(), "weight": weights, "held": (counted < conditional).float()},
    )
