"""Success rates with intervals, on initial states that training never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate (Wilson 1927)."""
    if episodes == 0:
        return 0.0, 1.0
    rate = successes / episodes
    centre = (rate + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = z / (1 + z**2 / episodes) * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    # At 0 and at 1 rounding would leave the rate itself just outside.
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def success_summary(results: Sequence[bool]) -> dict[str, Any]:
    """``successes``, ``episodes``, ``rate`` and ``ci95`` of a list of outcomes."""
    successes = sum(results)
    return {
        "successes": successes,
        "episodes": len(results),
        "rate": successes / len(results) if results else None,
        "ci95": list(wilson_interval(successes, len(results))),
    }


def paired_p_value(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact McNemar test: probability of at least so lopsided a change if nothing had changed.

    Args:
        before: outcomes by context.
        after: outcomes of the same contexts in the same order.
    """
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    changed = gained + lost
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return min(1.0, 2 * tail)
