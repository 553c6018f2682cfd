"""Success rates with intervals, on initial states that training never saw, random placements and shifted tasks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, TypedDict

from ript_ray.config import Config
from ript_ray.envs.tasks import SHIFTED, SHIFTS
from ript_ray.errors import UserError
from ript_ray.types import Context

Columns = dict[str, list[Context]]


def evaluation_contexts(config: Config) -> Columns:
    """What is played before and after training, by column of the report; the same lists each time.

    ``held_out``: initial states that training never saw, in turn, each time with another noise seed;
    ``random_placement``: objects placed by the seed; ``shifted``: LIBERO-PRO's variants. With several tasks the
    episodes are shared out among them. Empty columns are left out.

    Raises:
        UserError: when there are no variants of a task.
    """
    first, end = config.env.eval_init_states
    ids, settings = config.env.ids, config.eval
    shifted = [f"{suite}_{shift}/{task}" for suite, _, task in (i.partition("/") for i in ids) for shift in SHIFTS]
    if settings.shifted and not all(name.partition("/")[0] in SHIFTED for name in shifted):
        raise UserError(
            f"eval.shifted={settings.shifted}: only libero_spatial, libero_object, libero_goal and libero_10 have "
            f"variants, not all of env.id={config.env.id!r}; set eval.shifted=0"
        )
    columns = {
        "held_out": [
            Context(ids[i % len(ids)], first + i // len(ids) % (end - first), settings.seed + i)
            for i in range(settings.episodes)
        ],
        "random_placement": [
            Context(ids[i % len(ids)], None, settings.seed + i) for i in range(settings.random_placement)
        ],
        "shifted": [
            Context(shifted[i % len(shifted)], first + i // len(shifted) % (end - first), settings.seed + i)
            for i in range(settings.shifted)
        ],
    }
    return {name: contexts for name, contexts in columns.items() if contexts}


def wilson_interval(successes: float, episodes: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate (Wilson 1927)."""
    if episodes == 0:
        return 0.0, 1.0
    rate = successes / episodes
    centre = (rate + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = z / (1 + z**2 / episodes) * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    # At 0 and at 1 rounding would leave the rate itself just outside.
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


class Success(TypedDict):
    """A success rate, as files have it."""

    successes: int
    episodes: int
    effective_episodes: float
    """So many independent ones tell as much."""
    rate: float | None
    """None where there were no episodes."""
    ci95: list[float]
    """Lower and upper end of the 95 % interval."""


def success_summary(results: Sequence[bool], starts: Sequence[Hashable] | None = None) -> Success:
    """The success rate of a list of outcomes.

    Args:
        results: the outcomes.
        starts: where each began; several from the same start tell less than as many from different ones, and the
            interval is that of `effective_episodes`.
    """
    successes, episodes = sum(results), len(results)
    effective = episodes if starts is None else effective_episodes(results, starts)
    return {
        "successes": successes,
        "episodes": episodes,
        "effective_episodes": effective,
        "rate": successes / episodes if results else None,
        "ci95": list(wilson_interval(successes * effective / max(1, episodes), effective)),
    }


def summary_by_start(results: Sequence[tuple[bool, Hashable]]) -> Success:
    """`success_summary` of outcomes, each with its start."""
    return success_summary([success for success, _ in results], [start for _, start in results])


def success_row(section: str, results: Sequence[tuple[bool, Hashable]]) -> dict[str, float]:
    """The same as columns of a row of metrics, which begin with ``section``; a rate of 0 where nothing was played."""
    summary = summary_by_start(results)
    low, high = summary["ci95"]
    return {
        f"{section}/success_rate": summary["rate"] or 0.0,
        f"{section}/success_low": low,
        f"{section}/success_high": high,
        f"{section}/episodes": summary["episodes"],
        f"{section}/effective_episodes": summary["effective_episodes"],
    }


def effective_episodes(results: Sequence[bool], starts: Sequence[Hashable]) -> float:
    """So many independent episodes tell as much of the success rate as these, of which some share a start.

    n / (1 + (m − 1)ρ) with m episodes of a start and ρ the correlation of outcomes within a start, by analysis of
    variance (Kish 1965, "Survey sampling"; Donner and Klar 2000): n where outcomes do not depend on the start, the
    number of starts where they depend on nothing else, or where all agree and nothing says that they do not.
    """
    groups: defaultdict[Hashable, list[bool]] = defaultdict(list)
    for result, start in zip(results, starts, strict=True):
        groups[start].append(result)
    n, k = len(results), len(groups)
    if k == n or k < 2:  # of a single start all that can be said is how good it is from there
        return float(n)
    mean = sum(results) / n
    between = sum(len(own) * (sum(own) / len(own) - mean) ** 2 for own in groups.values()) / (k - 1)
    within = sum(sum(own) * (1 - sum(own) / len(own)) for own in groups.values()) / (n - k)
    size = (n - sum(len(own) ** 2 for own in groups.values()) / n) / (k - 1)
    total = between + (size - 1) * within
    correlation = max(0.0, (between - within) / total) if total > 0 else 1.0
    return n / (1 + (size - 1) * correlation)


def paired_p_value(before: Sequence[bool], after: Sequence[bool], starts: Sequence[Hashable] | None = None) -> float:
    """Probability of at least so large a change, up or down, if nothing had changed.

    An exact test by all signs of the changes from each start. Where every start is another this is McNemar's test.

    Args:
        before: outcomes by context.
        after: outcomes of the same contexts in the same order.
        starts: where each began; by default from different starts.
    """
    changes: Counter[Hashable] = Counter()
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        changes[i if starts is None else starts[i]] += int(a) - int(b)
    chances = {0: 1.0}
    for change in filter(None, changes.values()):
        reached: defaultdict[int, float] = defaultdict(float)
        for total, chance in chances.items():
            reached[total + change] += chance / 2
            reached[total - change] += chance / 2
        chances = reached
    seen = abs(sum(changes.values()))
    return min(1.0, sum(chance for total, chance in chances.items() if abs(total) >= seen))


def by_task(contexts: Sequence[Context], before: Sequence[bool | None], after: Sequence[bool | None]) -> dict[str, Any]:
    """`before_and_after` of each task, where the contexts are of several."""
    tasks = sorted({context.env_id for context in contexts})
    rows = {task: [i for i, context in enumerate(contexts) if context.env_id == task] for task in tasks}
    return {
        task: before_and_after([contexts[i] for i in own], [before[i] for i in own], [after[i] for i in own])
        for task, own in rows.items()
    }


def before_and_after(
    contexts: Sequence[Context], before: Sequence[bool | None], after: Sequence[bool | None]
) -> dict[str, Any]:
    """``base``, ``final`` and ``paired_p`` of the same contexts, without those whose environment failed."""
    rows = [
        (context.start, b, a)
        for context, b, a in zip(contexts, before, after, strict=True)
        if b is not None and a is not None
    ]
    starts, base, final = [start for start, _, _ in rows], [b for _, b, _ in rows], [a for _, _, a in rows]
    return {
        "base": success_summary(base, starts),
        "final": success_summary(final, starts),
        "paired_p": paired_p_value(base, final, starts),
    }
