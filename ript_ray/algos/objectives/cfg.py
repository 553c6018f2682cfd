"""Classifier-free guidance on the sign of the advantage, both branches at once."""

from __future__ import annotations

from ript_ray.algos.objectives.draw import Draw, Loss
from ript_ray.config import ObjectiveConfig


def cfg(draw: Draw, settings: ObjectiveConfig) -> Loss:
    """1{A > 0}·ℓ(c = 1) + α·ℓ(c = 0), with shared noise and time (CFGRL, arXiv 2505.23458, dual branch).

    With binary rewards the first term imitates successes, the second everything; guidance extrapolates between them.
    """
    conditional, unconditional = (draw.mean(draw.errors(v)) for v in draw.velocity(1, 0))
    good = (draw.batch.advantages > 0).float()
    return Loss(
        good * conditional + settings.alpha * unconditional,
        {"conditional": conditional.detach(), "unconditional": unconditional.detach(), "positive_share": good},
    )
