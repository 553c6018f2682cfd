"""Imitation of every sample whatever its advantage."""

from __future__ import annotations

from ript_ray.algos.objectives.draw import Draw, Loss
from ript_ray.config import ObjectiveConfig


def imitation(draw: Draw, settings: ObjectiveConfig) -> Loss:
    """ℓ(c = 1) + α·ℓ(c = 0): flow matching (arXiv 2210.02747). Supervised learning, and the control of experiments."""
    conditional, unconditional = (draw.mean(draw.errors(v)) for v in draw.velocity(1, 0))
    branches = {"conditional": conditional.detach(), "unconditional": unconditional.detach()}
    return Loss(conditional + settings.alpha * unconditional, branches)
