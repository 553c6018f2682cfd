"""Policy gradient with a true likelihood: one stochastic Euler step in each chunk."""

from __future__ import annotations

from ript_ray.algos.objectives.clipped import clipped_surrogate
from ript_ray.algos.objectives.draw import Draw, Loss
from ript_ray.config import ObjectiveConfig


def flow_sde(draw: Draw, settings: ObjectiveConfig) -> Loss:
    """−min(ρA, clip(ρ, 1 ± ε)A) with ρ = p(x_next | x) / p_old(x_next | x) of the recorded stochastic step.

    Flow-SDE of π_RL (arXiv 2510.25889, one step of noise in a chunk) with leave-one-out advantages: LOOP of RIPT-VLA
    (arXiv 2505.17016) for flow policies. The old probability was recorded by the rollout, so samples of any version
    have their own. Only c = 1 is trained, and only what was executed counts.
    """
    now, then = draw.chain_log_prob()
    return clipped_surrogate(now - then, draw.batch.weights, settings.ratio_clip)
