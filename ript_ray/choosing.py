"""Choosing between guidance scales, or between the policies of several updates, without a look at the exam."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ript_ray.errors import UserError
from ript_ray.evaluation import Success, paired_p_value, success_summary, summary_by_start, wilson_interval
from ript_ray.policies.checkpoints import load_policy

log = logging.getLogger("ript_ray")

Candidate = TypeVar("Candidate", bound=Hashable)
Results = dict[Candidate, list[bool | None]]
"""Successes of each in the same contexts, None where the environment failed."""
Play = Callable[[Candidate, range], Sequence[bool | None]]
"""Successes of a candidate in the contexts of these indices, which are the same for all."""


def successive_halving(
    candidates: Sequence[Candidate],
    play: Play[Candidate],
    first: int,
    preferred: Callable[[Candidate], float],
    always: Sequence[Candidate] = (),
) -> tuple[Candidate, Results[Candidate]]:
    """The best of several: all play ``first`` episodes, the better half plays on to twice as many, and so on.

    Args:
        candidates: what is chosen from.
        play: plays.
        first: episodes of each in the first round.
        preferred: of equals the one with the largest value is the better.
        always: those that play every round, whether they are still in the running or not.

    Returns:
        The one that is left, and all results.
    """
    results: Results[Candidate] = {candidate: [] for candidate in candidates}
    alive, count = list(candidates), first
    while True:
        for candidate in dict.fromkeys([*alive, *always]):
            results[candidate] += play(candidate, range(len(results[candidate]), count))
        alive = sorted(alive, key=lambda candidate: (_rate(results[candidate]), preferred(candidate)), reverse=True)
        alive = alive[: -(-len(alive) // 2)]
        if len(alive) == 1:
            return alive[0], results
        count *= 2


def choose_guidance(scales: Sequence[float], play: Play[float], first: int) -> dict[str, Any]:
    """Choose a guidance scale by successive halving.

    w = 1 plays every round, and what wins must also be told apart from it: McNemar's test in the same contexts, at 5 %
    shared out among all that might have won (Bonferroni), else 1 is chosen.

    Args:
        scales: w, with 1 among them.
        play: plays.
        first: episodes of each in the first round.

    Returns:
        ``chosen``, ``best`` (by rate alone), ``paired_p`` of the best against 1, ``settings_tried``, and a ``table``
        with the summary of each scale.
    """
    # Of equals the one nearest to 1, since extrapolation is not free of harm.
    best, results = successive_halving(scales, play, first, lambda scale: -abs(scale - 1), always=[1.0])
    best = best if _rate(results[best]) > _rate(results[1.0]) else 1.0
    pairs = [(one, two) for one, two in zip(results[1.0], results[best], strict=True) if None not in (one, two)]
    p_value = paired_p_value([bool(one) for one, _ in pairs], [bool(two) for _, two in pairs])
    return {
        "chosen": best if p_value < 0.05 / max(1, len(scales) - 1) else 1.0,
        "best": best,
        "paired_p": p_value,
        "settings_tried": len(scales),
        "table": [{"scale": scale} | _summary(results[scale]) for scale in scales],
    }


def choose_update(updates: Sequence[int], play: Play[int], first: int) -> dict[str, Any]:
    """Choose the update whose policy does best, of equals the later one.

    Returns:
        ``update``, and a ``table`` with the summary of each; of a single one, which nobody plays, an empty table.
    """
    if len(updates) == 1:
        return {"update": updates[0], "table": []}
    best, results = successive_halving(updates, play, first, preferred=float)
    return {"update": best, "table": [{"update": update} | _summary(results[update]) for update in updates]}


def best_in_rollouts(played: Mapping[int, Sequence[tuple[bool, Hashable]]]) -> list[int]:
    """Updates by the lower bound of their policies' success in rollouts, the best first, of equals the later one.

    Args:
        played: success and start of rollouts by the version of the weights; those of the starting policy, 0, do not
            count.
    """

    def low(results: Sequence[tuple[bool, Hashable]]) -> float:
        if all(success for success, _ in results):  # that none failed must not count for less than that one did
            return wilson_interval(len(results), len(results))[0]
        return float(summary_by_start(results)["ci95"][0])

    ranked = {version: low(results) for version, results in played.items() if version > 0}
    return sorted(ranked, key=lambda version: (ranked[version], version), reverse=True)


def candidates(last: int, best: Sequence[int], count: int, checkpoints: Path) -> list[int]:
    """The updates to choose from: the last, and those that did best in rollouts, ``count`` in all at most.

    Args:
        last: the last update.
        best: updates, the best in rollouts first.
        count: ``train.candidates``.
        checkpoints: folder of the run; what cannot be read there is not among them, and the log says so.
    """
    found = [last]
    for update in best:
        folder = checkpoints / f"{update:04d}"
        if len(found) == count or update == last or not folder.exists():
            continue
        try:
            load_policy(folder)
            found.append(update)
        except UserError as error:
            log.warning("the policy of update %d is not compared: %s", update, error)
    return sorted(found)


def episodes_of_halving(count: int, first: int) -> int:
    """So many episodes `successive_halving` plays with ``count`` candidates; none with one."""
    total, alive, new = 0, count, first
    while alive > 1:
        total += alive * new
        alive, new = -(-alive // 2), new if alive == count else 2 * new
    return total


def _rate(results: Sequence[bool | None]) -> float:
    """Of success, without those whose environment failed."""
    return _summary(results)["rate"] or 0.0


def _summary(results: Sequence[bool | None]) -> Success:
    """`success_summary` without those whose environment failed."""
    return success_summary([result for result in results if result is not None])
