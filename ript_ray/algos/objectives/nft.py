"""Negative-aware fine-tuning: failures teach by reflection."""

from __future__ import annotations

from ript_ray.algos.objectives.draw import Draw, Loss
from ript_ray.config import ObjectiveConfig


def nft(draw: Draw, settings: ObjectiveConfig) -> Loss:
    """r·ℓ(v⁺) + (1 − r)·ℓ(v⁻) with v^± = v_old ± β(v − v_old) (DiffusionNFT, arXiv 2509.16117; π-StepNFT, 2603.02083).

    r = ½ + ½·clip(A, −1, 1) of the processed advantage. A failure pulls the reflected velocity v⁻ towards what was
    done, hence v away from it, and no further: the loss is a sum of squares, bounded below. Divided by β, so that a
    learning rate means the same for every β. Only c = 1 is trained.
    """
    (velocity,) = draw.velocity(1)
    (old,) = draw.reference_velocity(1)
    step = settings.beta * (velocity - old)
    optimality = 0.5 + 0.5 * draw.batch.weights.clamp(-1.0, 1.0)
    positive, negative = draw.mean(draw.errors(old + step)), draw.mean(draw.errors(old - step))
    return Loss(
        (optimality * positive + (1 - optimality) * negative) / settings.beta,
        {"positive": positive.detach(), "negative": negative.detach(), "moved": draw.mean(step.detach().square())},
    )
