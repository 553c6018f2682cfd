"""Who plays which episode: one in flight per actor, and actors that die or hang are replaced."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.rollout import EpisodeReport
from ript_ray.config import ScalingConfig
from ript_ray.types import Context

_MAX_ATTEMPTS = 3
"""An episode that fails so often ends the run: the fault is not the actor's."""


@dataclass(slots=True)
class Episode:
    """One episode to be played, and how often that was tried."""

    tag: int
    """Group that asked for the episode, or −1 for evaluation."""
    context: Context
    guidance: float
    attempts: int = 0
    deadline: float = 0.0


class Dispatcher:
    """Keeps one episode in flight per actor and survives the loss of actors.

    Args:
        actors: handles of `RolloutActor`.
        scaling: its ``episode_timeout_s`` limits one episode, its ``wait_timeout_s`` the wait for lost actors when none
            is left.
    """

    def __init__(self, actors: list[Any], scaling: ScalingConfig) -> None:
        self._idle = deque(actors)
        self._lost: dict[Any, Any] = {}
        """Actors that died, by the reference of a call that returns when Ray has started them again."""
        self._alive_at = time.monotonic()
        self._timeout_s = scaling.episode_timeout_s
        self._restart_timeout_s = scaling.wait_timeout_s
        self._queue: deque[Episode] = deque()
        self._running: dict[Any, tuple[Any, Any, Episode]] = {}
        self.errors: list[str] = []
        """Faults that were survived."""

    def submit(self, episode: Episode) -> None:
        """Queue an episode and start it if an actor is free."""
        self._queue.append(episode)
        self._start()

    def cancel(self, tags: set[int]) -> int:
        """Drop queued episodes of these groups; those that run are left to finish. Returns how many were dropped."""
        kept = [episode for episode in self._queue if episode.tag not in tags]
        dropped = len(self._queue) - len(kept)
        self._queue = deque(kept)
        return dropped

    @property
    def outstanding(self) -> int:
        """Episodes queued or running."""
        return len(self._queue) + len(self._running)

    def wait(self) -> list[tuple[Episode, EpisodeReport, Any]]:
        """Finished episodes, at least one unless none is outstanding; handles failures on the way.

        Raises:
            RuntimeError: when one episode has failed three times, or no actor is left.
        """
        finished: list[tuple[Episode, EpisodeReport, Any]] = []
        while not finished and self.outstanding:
            self._check_that_somebody_plays()
            done, _ = ray.wait([*self._running, *self._lost], timeout=1.0)
            for reference in done:
                if reference in self._lost:
                    self._welcome_back(reference)
                    continue
                actor, trajectory_ref, episode = self._running.pop(reference)
                try:
                    finished.append((episode, ray.get(reference, timeout=self._timeout_s), trajectory_ref))
                    self._idle.append(actor)
                except RayActorError as error:
                    # Ray starts it again; until then each call would fail at once. This one is repeated till it is up.
                    self._lost[actor.renderer.options(max_task_retries=-1).remote()] = actor
                    self._retry(episode, error)
                except RayTaskError as error:
                    self._idle.append(actor)
                    self._retry(episode, error)
            self._end_overdue()
            self._start()
        return finished

    def _welcome_back(self, reference: Any) -> None:
        actor = self._lost.pop(reference)
        try:
            ray.get(reference, timeout=self._timeout_s)
            self._idle.append(actor)
        except RayActorError as error:  # it cannot be started again; the others go on
            self.errors.append(f"a rollout actor is gone for good: {error}")

    def _check_that_somebody_plays(self) -> None:
        if self._running:
            self._alive_at = time.monotonic()
        elif not self._lost or time.monotonic() > self._alive_at + self._restart_timeout_s:
            last = self.errors[-1] if self.errors else "none"
            raise RuntimeError(f"no rollout actor is left to play {self.outstanding} episodes; last error: {last}")

    def _start(self) -> None:
        while self._queue and self._idle:
            actor, episode = self._idle.popleft(), self._queue.popleft()
            episode.attempts += 1
            episode.deadline = time.monotonic() + self._timeout_s
            report, trajectory = actor.collect.options(num_returns=2).remote(episode.context, episode.guidance)
            self._running[report] = (actor, trajectory, episode)

    def _end_overdue(self) -> None:
        """A hung simulator cannot rescue itself: its process is killed, Ray starts it anew, the episode is retried."""
        for _, (actor, _, episode) in list(self._running.items()):
            if time.monotonic() > episode.deadline:
                episode.deadline = float("inf")  # its reference fails shortly and is then retried by `wait`
                self.errors.append(f"{episode.context}: no result after {self._timeout_s:.0f} s, actor killed")
                ray.kill(actor, no_restart=False)

    def _retry(self, episode: Episode, error: Exception) -> None:
        reason = f"{episode.context}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        if episode.attempts >= _MAX_ATTEMPTS:
            raise RuntimeError(f"an episode failed {_MAX_ATTEMPTS} times, last with {reason}") from error
        self.errors.append(reason)
        self._queue.appendleft(episode)
