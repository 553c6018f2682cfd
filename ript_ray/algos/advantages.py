"""Leave-one-out advantages (RLOO) of a group of rollouts of one context."""

from __future__ import annotations

import numpy as np


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """A_k = r_k − mean of the other K − 1 rewards of the group (RIPT-VLA, arXiv 2505.17016).

    Args:
        rewards: float[K], K ≥ 2.

    Returns:
        float64[K]. For binary rewards with n successes: (K − n)/(K − 1) for a success, −n/(K − 1) for a failure.

    Raises:
        ValueError: for fewer than two rewards or a reward that is not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1 or len(rewards) < 2 or not np.isfinite(rewards).all():
        raise ValueError(f"expected at least two finite rewards, got {rewards}")
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return rewards - others


def is_mixed(rewards: np.ndarray) -> bool:
    """Does the group tell anything? A group in which all rewards are equal has no advantages and is rejected."""
    return bool(np.ptp(np.asarray(rewards)) > 0)
