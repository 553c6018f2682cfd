"""Leave-one-out advantages (RLOO) of a group of rollouts of one context, and how they become weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ript_ray.config import ObjectiveConfig


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


def is_kept(rewards: np.ndarray, config: ObjectiveConfig) -> bool:
    """Is the group trained on? Only one that is mixed, where rollouts are compared within their group."""
    return config.name == "imitation" or config.baseline == "task" or is_mixed(rewards)


def against_task(successes: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """Advantages against all other rollouts of the same task, instead of those of the same group.

    A_i = r_i − (½ + Σ_{j≠i} r_j) / n of the task's n rollouts: leave-one-out with one more rollout, which half
    succeeded. So a success is good and a failure bad even where all of the task's agree, and a group that succeeds or
    fails as a whole counts, as with a value function that knows only the task (RECAP, arXiv 2511.14759, has one that
    sees the state).

    Args:
        successes: of all trajectories of an update, bool[N].
        tasks: of each.

    Returns:
        float64[N].
    """
    rewards = np.asarray(successes, dtype=np.float64)
    advantages = np.zeros(len(rewards))
    for task in set(tasks):
        own = np.asarray(tasks) == task
        others = rewards[own].sum() - rewards[own]
        advantages[own] = rewards[own] - (0.5 + others) / own.sum()
    return advantages


def credit_fastest(
    advantages: np.ndarray, lengths: np.ndarray, successes: np.ndarray, tasks: Sequence[str], share: float
) -> np.ndarray:
    """Take the credit of slow successes: their advantage becomes 0, neither good nor bad.

    A success that fumbled and tried again would teach to fumble. π*0.6 likewise measures advantages by the steps that
    are left until success and counts a share of them as good (RECAP, arXiv 2511.14759).

    Args:
        advantages: of all trajectories of an update, float[N].
        lengths: their numbers of steps.
        successes: bool[N].
        tasks: of each; every task has its own pace.
        share: of a task's successes that keep theirs, the fastest; those as long as the slowest of them do, too.

    Returns:
        float64[N].
    """
    credited = np.array(advantages, dtype=np.float64)
    for task in set(tasks):
        own = successes & (np.asarray(tasks) == task)
        if own.any():
            slowest = np.quantile(lengths[own], share, method="inverted_cdf")
            credited[own & (lengths > slowest)] = 0.0
    return credited


@dataclass(frozen=True, slots=True)
class AdvantageCounts:
    """What `process` met."""

    not_finite: int
    """NaN or infinite advantages; they have no weight."""
    outliers: int
    """Advantages further from the median than ten deviations, which are estimated from the median absolute deviation,
    or the mean one where that is 0 (Iglewicz and Hoaglin 1993); they were left to ``clip``."""
    clipped: int
    """Advantages that ``clip`` moved."""


_EPS = 1e-8
_OUTLIER = 10.0


def process(advantages: np.ndarray, config: ObjectiveConfig) -> tuple[np.ndarray, AdvantageCounts]:
    """Normalise, clip, and turn negatives into weights, as ``objective.*`` says.

    Args:
        advantages: of all trajectories of an update, float[N].
        config: chooses each of the three; see there for the formulas.

    Returns:
        Weights, finite: float64[N], and what was met on the way.
    """
    values = np.asarray(advantages, dtype=np.float64)
    finite = np.isfinite(values)
    normalised = _normalise(values[finite], config.normalise)
    clipped = _clip(normalised, config)
    weights = np.zeros(len(values))
    weights[finite] = _negatives(clipped, config)
    moved = int((clipped != normalised).sum())
    return weights, AdvantageCounts(int((~finite).sum()), _outliers(values[finite]), moved)


def _outliers(values: np.ndarray) -> int:
    if not values.size:
        return 0
    distances = np.abs(values - np.median(values))
    # Factors by which a normal distribution's deviation exceeds the two.
    deviation = 1.4826 * float(np.median(distances)) or 1.2533 * float(distances.mean())
    return int((distances > _OUTLIER * deviation).sum())


def _normalise(values: np.ndarray, how: str) -> np.ndarray:
    if how == "none" or not values.size:
        return values
    if how == "min_max":
        return (values - values.min()) / max(float(np.ptp(values)), _EPS)
    if how == "robust":
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        # The interquartile range of a normal distribution is 1.349 deviations; it is 0 when half the values are equal.
        return (values - middle) / ((high - low) / 1.349 if high > low else 1.0)
    centred = values - values.mean()
    return centred if how == "zero_mean" else centred / max(float(values.std()), _EPS)


def _clip(values: np.ndarray, config: ObjectiveConfig) -> np.ndarray:
    if config.clip == "none" or not values.size:
        return values
    if config.clip == "quantile":
        low, high = np.quantile(values, [config.clip_quantile, 1 - config.clip_quantile])
    else:
        low = -(config.clip_high if config.clip == "symmetric" else config.clip_low)
        high = config.clip_high
    return np.clip(values, low, high)


def _negatives(values: np.ndarray, config: ObjectiveConfig) -> np.ndarray:
    tau = config.temperature
    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "keep": lambda a: a,
        "hinge": lambda a: a,
        "softplus": lambda a: tau * np.logaddexp(0.0, a / tau),
        "exp": lambda a: np.exp(np.minimum(a / tau, np.log(config.weight_limit))),
        "abs": np.abs,
        "clamp": lambda a: np.maximum(a, config.floor),
        "relu": lambda a: np.maximum(a, 0.0),
    }
    return rules[config.negatives](values)
