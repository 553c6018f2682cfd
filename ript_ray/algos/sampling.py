"""Which initial states of which tasks to try next: dynamic sampling with a skip list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ript_ray.config import EnvConfig, SamplingConfig
from ript_ray.config.job import PLACEMENTS
from ript_ray.types import Context, Start


@dataclass(frozen=True, slots=True)
class Group:
    """K rollouts of one initial state, compared with each other."""

    id: int
    start: Start
    contexts: tuple[Context, ...]


@dataclass(frozen=True, slots=True)
class SetAside:
    """A task, or one start of it, that the rest of the run does without."""

    env_id: str
    init_state: int | None
    placement: int | None
    """The whole task if there is neither."""
    reason: str

    @property
    def start(self) -> Start:
        """Where it is, or the task with neither state nor placement."""
        return self.env_id, self.init_state, self.placement


_STATES_TO_SET_TASK_ASIDE = 3
_CURRICULUM_WIDTH = 0.2
"""Success rates so far from the target are drawn 0.6 times as often."""


def training_starts(config: EnvConfig) -> list[Start]:
    """Where training starts: ``train_init_states`` of each task, or ``train_placements`` random placements."""
    if config.train_placements:
        return [(env_id, None, PLACEMENTS.start + i) for i in range(config.train_placements) for env_id in config.ids]
    return [(env_id, state, None) for state in range(*config.train_init_states) for env_id in config.ids]


def contexts_to_choose_by(config: EnvConfig, first_seed: int, episodes: range) -> list[Context]:
    """Episodes by which policies or settings are compared: from placements that neither training nor the exam has."""
    first, tasks = PLACEMENTS.start + config.train_placements, config.ids
    return [start_context((tasks[i % len(tasks)], None, first + i // len(tasks)), first_seed + i) for i in episodes]


def start_context(start: Start, seed: int) -> Context:
    """An episode from there, with this noise."""
    env_id, state, placement = start
    return Context(env_id, state, seed, placement)


class ContextSampler:
    """Draws groups of contexts in shuffled passes over the starts of training.

    A state at which every rollout succeeded in ``skip_after`` groups in a row teaches nothing and is skipped; after
    ``remeasure_after`` skips it is tried again, since the policy may have forgotten it. With ``target_success`` states
    are not taken in turn but drawn, the more often the nearer their success rate is to that.

    Args:
        starts: see `training_starts`.
        config: group size and skip rule.
        seed: makes the sequence reproducible.
    """

    def __init__(self, starts: Sequence[Start], config: SamplingConfig, seed: int) -> None:
        self._starts = list(starts)
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._order: list[Start] = []
        self._perfect = dict.fromkeys(self._starts, 0)
        self._passed_over = dict.fromkeys(self._starts, 0)
        self._rates = dict.fromkeys(self._starts, 0.5)
        self._groups = 0
        self.skipped = 0
        """How often a state was passed over."""
        self.aside: list[SetAside] = []
        """What is not tried any more."""

    def next_group(self) -> Group:
        """The next group to roll out."""
        start = self._next_start()
        group, size = self._groups, self._config.group_size
        self._groups += 1
        # Distinct seeds within a run and between runs; evaluation seeds lie elsewhere (see EvalConfig.seed).
        # NumPy's generators, which simulators use, take 32 bits.
        first = 2_000_000 + (self._seed * 10_000_000 + group * size) % (2**32 - 2_100_000)
        env_id, state, placement = start
        # Also a given initial state leaves something to the environment's seed: the places of fixtures.
        shared = first if placement is None else placement
        return Group(group, start, tuple(Context(env_id, state, first + k, shared) for k in range(size)))

    def record(self, group: Group, rewards: np.ndarray) -> None:
        """Note the result of a finished group."""
        perfect = bool((np.asarray(rewards) >= 1.0).all())
        # The policy changes, so half of what is known of a state is what its last group said.
        self._rates[group.start] = 0.5 * self._rates[group.start] + 0.5 * float(np.mean(rewards))
        self._perfect[group.start] = self._perfect[group.start] + 1 if perfect else 0

    def set_aside(self, context: Context, reason: str) -> None:
        """Try this initial state no more, since its environment fails; after three of them, the task no more.

        Raises:
            RuntimeError: when nothing is left to try.
        """
        if self.is_aside(context):
            return
        dropped = {context.start}
        self.aside.append(SetAside(*context.start, reason))
        if sum(entry.env_id == context.env_id for entry in self.aside) == _STATES_TO_SET_TASK_ASIDE:
            dropped.update(start for start in self._starts if start[0] == context.env_id)
            self.aside.append(SetAside(context.env_id, None, None, f"{_STATES_TO_SET_TASK_ASIDE} initial states fail"))
        self._starts = [start for start in self._starts if start not in dropped]
        self._order = [start for start in self._order if start not in dropped]
        if not self._starts:
            raise RuntimeError(f"the environments of all tasks fail again and again; last: {reason}")

    def is_aside(self, context: Context) -> bool:
        """Was its initial state or its task set aside?"""
        return any(entry.start in (context.start, (context.env_id, None, None)) for entry in self.aside)

    def _next_start(self) -> Start:
        # A whole pass may be skipped, but each pass brings every state closer to being measured again.
        while True:
            if not self._order:
                self._order = self._next_pass()
            start = self._order.pop()
            if self._perfect[start] < self._config.skip_after:
                return start
            if self._passed_over[start] >= self._config.remeasure_after:
                self._passed_over[start] = 0
                self._perfect[start] = 0
                return start
            self._passed_over[start] += 1
            self.skipped += 1

    def _next_pass(self) -> list[Start]:
        count, target = len(self._starts), self._config.target_success
        if target is None:
            return [self._starts[i] for i in self._rng.permutation(count)]
        distance = np.array([self._rates[start] for start in self._starts]) - target
        likely = np.exp(-0.5 * (distance / _CURRICULUM_WIDTH) ** 2)
        # One at a time, so that what the last group said counts for the next.
        return [self._starts[self._rng.choice(count, p=likely / likely.sum())]]
