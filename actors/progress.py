"""What a job is doing now, and how much of all its work is done."""

from __future__ import annotations

import threading
from typing import Any

from ript_ray.choosing import episodes_of_halving
from ript_ray.config import Config

CHOOSING = "choosing among updates"
CHOOSING_GUIDANCE = "choosing the guidance scale"


class Progress:
    """Told by the coordinator's loop and by the learner, asked by whoever shows it; from any thread.

    Args:
        config: says how much work there will be.
        training: or only evaluation.
    """

    def __init__(self, config: Config, training: bool) -> None:
        self._lock = threading.Lock()
        self._stage = "starting"
        self._done = 0
        self._expected = 0
        choosing = episodes_of_halving(min(config.train.candidates, config.train.updates), config.eval.halving_episodes)
        halving = episodes_of_halving(len(config.eval.scales), config.eval.halving_episodes)
        self._planned = {CHOOSING: choosing, CHOOSING_GUIDANCE: halving}
        """Episodes of stages that are entered several times."""
        self._shares = _planned_work(config, training, choosing)
        self._finished = dict.fromkeys(self._shares, 0.0)
        self._earlier = 0.0

    def enter(self, stage: str, expected: int) -> None:
        """Begin a stage of so many episodes, or more of the present one; the one before is finished."""
        with self._lock:
            if stage == self._stage:
                self._expected = max(self._expected, self._done + expected)
                return
            if self._stage in self._finished:
                self._finished[self._stage] = 1.0
            self._stage, self._done, self._expected = stage, 0, max(expected, self._planned.get(stage, 0))

    def one_more(self, earlier: bool = False) -> None:
        """An episode of this stage is done, or was by an earlier session."""
        with self._lock:
            self._done += 1
            if self._stage in self._finished:
                self._finished[self._stage] = min(1.0, self._done / max(1, self._expected))
            if earlier:
                self._earlier = self._fraction()

    def learning(self, step: int, done: int, expected: int) -> None:
        """So many optimiser steps of an update are done; rollouts that run meanwhile are shown rather."""
        stage = f"update {step + 1}: learning"
        with self._lock:
            self._finished[stage] = done / expected
            if not self._stage.endswith("rollouts"):
                self._stage, self._done, self._expected = stage, done, expected

    def learnt_before(self, step: int) -> None:
        """An earlier session did this update."""
        with self._lock:
            self._finished[f"update {step + 1}: learning"] = 1.0
            self._earlier = self._fraction()

    def now(self) -> dict[str, Any]:
        """``stage``, ``done`` of ``expected`` in it, the ``fraction`` of the whole job, and what of that was done by
        ``earlier`` sessions, which says nothing of the speed.
        """
        with self._lock:
            return {
                "stage": self._stage,
                "done": self._done,
                "expected": self._expected,
                "fraction": self._fraction(),
                "earlier": self._earlier,
            }

    def _fraction(self) -> float:
        return sum(self._shares[k] * self._finished[k] for k in self._shares)


def _planned_work(config: Config, training: bool, choosing: int) -> dict[str, float]:
    """Share of each stage in the whole job, by a rough estimate of its duration in episodes.

    About half of the spare groups are needed, and on two cores a pass over an episode takes 0.008 of playing it.
    """
    evaluation = max(1, config.eval.episodes + config.eval.random_placement + config.eval.shifted)
    if not training:
        return {"evaluating": 1.0, CHOOSING_GUIDANCE: 1.0}  # one of them
    sampling = config.sampling
    episodes = (sampling.groups + sampling.max_groups) / 2 * sampling.group_size
    trained = sampling.groups * sampling.group_size
    work: dict[str, float] = {"evaluating before": evaluation, "evaluating after": evaluation}
    for step in range(config.train.updates):
        work[f"update {step + 1}: rollouts"] = episodes
        work[f"update {step + 1}: learning"] = trained * 0.008 * config.train.epochs * (step + 1)
    if choosing:
        work[CHOOSING] = choosing
    return {stage: amount / sum(work.values()) for stage, amount in work.items()}
