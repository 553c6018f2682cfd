"""Flow policy optimisation: a clipped ratio of flow-matching losses."""

from __future__ import annotations

from ript_ray.algos.objectives.clipped import clipped_surrogate
from ript_ray.algos.objectives.draw import Draw, Loss
from ript_ray.config import ObjectiveConfig

_LOG_RATIO_LIMIT = 3.0


def fpo(draw: Draw, settings: ObjectiveConfig) -> Loss:
    """−min(ρA, clip(ρ, 1 ± ε)A) with ρ = exp(clip(s·(ℓ_old − ℓ), ±3)) (FPO, arXiv 2507.21053).

    Both losses are of the same noise and time; the frozen policy gives the one that would have been stored. s
    (``objective.ratio_scale``) turns a mean over the chunk into the scale of a log-likelihood. Only c = 1 is trained.
    """
    (velocity,), (old,) = draw.velocity(1), draw.reference_velocity(1)
    improvement = draw.mean(draw.errors(old)) - draw.mean(draw.errors(velocity))
    log_ratio = (settings.ratio_scale * improvement).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return clipped_surrogate(log_ratio, draw.batch.weights, settings.ratio_clip)
