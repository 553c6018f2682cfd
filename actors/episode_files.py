"""Recorded episodes of a run on the disk: whole while they may be trained on, records afterwards."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import ray

from actors.dispatcher import Outcome
from actors.journal import Journal
from ript_ray.data.storage import forget_trajectory, load_trajectory
from ript_ray.errors import UserError

log = logging.getLogger("ript_ray")

_SPARE_VERSIONS = 2
"""Episodes stay whole a little longer: should the newest checkpoints be damaged, they are trained on again."""


class EpisodeFiles:
    """What is kept of the episodes that were played.

    Args:
        journal: of the run; numbers episodes.
        max_staleness: samples of weights older than so many versions are never trained on.
    """

    def __init__(self, journal: Journal, max_staleness: int) -> None:
        self._journal = journal
        self._max_staleness = max_staleness
        self._accepted: deque[tuple[int, int]] = deque()
        """Version and number of the episodes that are whole on disk, to be trained on."""

    def accept(self, outcomes: list[Outcome]) -> None:
        """These will be trained on."""
        self._accepted.extend((o.report.policy_version, o.episode.number) for o in outcomes if o.report is not None)

    def reference(self, outcome: Outcome, version: int) -> Any:
        """Of the trajectory; one that was played in an earlier session is read from its file, if an update needs it.

        Args:
            outcome: of the episode.
            version: of the weights that are published by now.

        Raises:
            UserError: when its file cannot be read.
        """
        file = self._journal.episode_file(outcome.episode.number)
        if outcome.reference is not None or file is None:
            return outcome.reference
        assert outcome.report is not None
        if outcome.report.policy_version < version - self._max_staleness:
            return None
        return ray.put(load_trajectory(file))

    def forget(self, number: int) -> bool:
        """Leave only the record of an episode that nothing will be learnt from; whether there was more."""
        file = self._journal.episode_file(number)
        # Actors that are only simulated write none (benchmarks/control.py).
        if file is not None and file.exists() and not self._journal.replaying:
            try:
                return forget_trajectory(file)
            except (OSError, UserError):  # nobody needs it, whole or damaged
                log.exception("%s was left as it is", file)
        return False

    def forget_stale(self, version: int) -> None:
        """Forget two accepted episodes, if there are, that are too old to be trained on again: more go than come."""
        if self._journal.replaying:  # earlier sessions need not have come to all of them
            return
        oldest = version - self._max_staleness - _SPARE_VERSIONS
        forgotten = 0
        while forgotten < 2 and self._accepted and self._accepted[0][0] < oldest:
            forgotten += self.forget(self._accepted.popleft()[1])
