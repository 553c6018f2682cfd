"""The advantage's sign as a condition that is sometimes left out."""

from __future__ import annotations

from ript_ray.algos.objectives.draw import Draw, Loss
from ript_ray.config import ObjectiveConfig


def label_dropout(draw: Draw, settings: ObjectiveConfig) -> Loss:
    """ℓ(c) with c = 1 for A > 0, except with probability ``dropout``, and c = 0 otherwise.

    Advantage conditioning of π*0.6 (RECAP, arXiv 2511.14759) with one condition less: c = 0 stands for "not good" as
    well as for "not told", so w = 1 acts like the good rollouts and w = 0 mostly like the others, where RECAP's null
    condition acts like all. One pass instead of the two of `cfg`.
    """
    good = draw.batch.advantages > 0
    kept = good & (draw.chance >= settings.dropout)
    (velocity,) = draw.velocity(kept.long())
    return Loss(draw.mean(draw.errors(velocity)), {"positive_share": good.float(), "conditional_share": kept.float()})
