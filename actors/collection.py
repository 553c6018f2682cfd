"""The rollouts of one update while they come in: open groups, quota, budget, and the row of metrics they give."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from actors.dispatcher import Outcome
from ript_ray.algos.sampling import Group
from ript_ray.config import SamplingConfig
from ript_ray.evaluation import success_row
from ript_ray.types import Start


@dataclass(slots=True)
class Collection:
    """The rollouts of one update while they come in."""

    config: SamplingConfig
    step: int
    in_order: bool
    """Are groups judged in the order in which they were opened?"""
    groups: dict[int, Group] = field(default_factory=dict)
    """Open ones, in that order."""
    finished: dict[int, list[Outcome]] = field(default_factory=dict)
    """Their rollouts so far."""
    results: dict[str, list[tuple[bool, Start]]] = field(default_factory=dict)
    """Success and start of each rollout of the groups that were judged, by task."""
    staleness: list[int] = field(default_factory=list)
    """Of the rollouts in them: how many versions older than the update's weights."""
    opened: int = 0
    accepted: int = 0
    all_failed: int = 0
    all_succeeded: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the collection began."""
        return time.perf_counter() - self.started

    @property
    def has_enough(self) -> bool:
        """Is the quota of accepted groups met?"""
        return self.accepted >= self.config.quota

    def open(self, group: Group) -> None:
        """Note a group that is now rolled out."""
        self.groups[group.id], self.finished[group.id] = group, []
        self.opened += 1

    def judged(self, start: Start, successes: list[bool], versions: list[int]) -> None:
        """Note the outcomes of a group that was complete, and the weights versions that it was played with."""
        self.results.setdefault(start[0], []).extend((success, start) for success in successes)
        self.staleness += [self.step - version for version in versions]

    def next_complete(self) -> Group | None:
        """A group to be judged, if there is one."""
        for group in self.groups.values():
            if len(self.finished[group.id]) == self.config.group_size:
                return group
            if self.in_order:
                break
        return None

    def ended_by(self) -> str | None:
        """The quota or the budget that ends it, if one does."""
        if self.has_enough:
            return "quota"
        if self.config.max_seconds is not None and self.seconds > self.config.max_seconds:
            return "seconds"
        return "groups" if not self.groups and self.opened >= self.config.max_groups else None

    def metrics(self, seconds: float) -> dict[str, float]:
        """A row of metrics: success with its 95 % interval, in all and of each task; groups, seconds."""
        row = {
            **success_row("rollout", [result for results in self.results.values() for result in results]),
            "rollout/groups_accepted": self.accepted,
            "rollout/groups_rejected": self.all_failed + self.all_succeeded,
            "rollout/groups_all_failed": self.all_failed,
            "rollout/groups_all_succeeded": self.all_succeeded,
            "rollout/groups_open": len(self.groups),
            "rollout/staleness": float(np.mean(self.staleness)) if self.staleness else 0.0,
            "rollout/seconds": seconds,
        }
        for task, results in sorted(self.results.items()):
            row |= success_row(f"task/{task}", results)
        return row
