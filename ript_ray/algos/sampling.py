"""Which initial states to try next: dynamic sampling with a skip list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ript_ray.config import SamplingConfig
from ript_ray.types import Context


@dataclass(frozen=True, slots=True)
class Group:
    """K rollouts of one initial state, compared with each other."""

    id: int
    init_state: int
    contexts: tuple[Context, ...]


class ContextSampler:
    """Draws groups of contexts in shuffled passes over the training states.

    A state at which every rollout succeeded in ``skip_after`` groups in a row teaches nothing and is skipped; after
    ``remeasure_after`` skips it is tried again, since the policy may have forgotten it.

    Args:
        env_id: the task.
        init_states: first and one past the last initial state to learn on.
        config: group size and skip rule.
        seed: makes the sequence reproducible.
    """

    def __init__(self, env_id: str, init_states: tuple[int, int], config: SamplingConfig, seed: int) -> None:
        self._env_id = env_id
        self._states = list(range(*init_states))
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._order: list[int] = []
        self._perfect = dict.fromkeys(self._states, 0)
        self._passed_over = dict.fromkeys(self._states, 0)
        self._groups = 0
        self.skipped = 0
        """How often a state was passed over."""

    def next_group(self) -> Group:
        """The next group to roll out."""
        state = self._next_state()
        group, size = self._groups, self._config.group_size
        self._groups += 1
        # Distinct seeds within a run and between runs; evaluation seeds lie elsewhere (see EvalConfig.seed).
        first = 2_000_000 + self._seed * 10_000_000 + group * size
        return Group(group, state, tuple(Context(self._env_id, state, first + k) for k in range(size)))

    def record(self, group: Group, rewards: np.ndarray) -> None:
        """Note the result of a finished group."""
        perfect = bool((np.asarray(rewards) >= 1.0).all())
        self._perfect[group.init_state] = self._perfect[group.init_state] + 1 if perfect else 0

    def _next_state(self) -> int:
        # A whole pass may be skipped, but each pass brings every state closer to being measured again.
        while True:
            if not self._order:
                self._order = list(self._rng.permutation(self._states))
            state = int(self._order.pop())
            if self._perfect[state] < self._config.skip_after:
                return state
            if self._passed_over[state] >= self._config.remeasure_after:
                self._passed_over[state] = 0
                self._perfect[state] = 0
                return state
            self._passed_over[state] += 1
            self.skipped += 1
