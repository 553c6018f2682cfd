"""Who plays which episode: one in flight per actor, and actors that die or hang are replaced.

What the journal of the run already holds is not played again. A trajectory counts once it is on this node, since the
node that made it may leave.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.experimental import get_local_object_locations

from actors.home import Home
from actors.journal import Journal, plain, recorded_report
from ript_ray.config import ScalingConfig
from ript_ray.data.storage import load_trajectory
from ript_ray.errors import UserError
from ript_ray.types import Context, EpisodeReport, FrameJob

_MAX_ATTEMPTS = 3
"""An episode that fails so often is given up: the fault is not the actor's."""
_OWNER_DIED = "its owner has died"
"""What Ray says of an actor that went with its driver: no fault of its episode, nor of the run."""


@dataclass(slots=True)
class Episode:
    """One episode to be played, and how often that was tried."""

    tag: int
    """Group that asked for the episode, or −1 for evaluation."""
    context: Context
    guidance: float
    exploring: bool = False
    number: int = -1
    """In the journal of the run; given by the dispatcher."""
    attempts: int = 0
    failed_on: set[Any] = field(default_factory=set)
    """Actors that could not play it: it may be they that are to blame."""
    deadline: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """An episode that was played, or given up."""

    episode: Episode
    report: EpisodeReport | None
    """None when it was given up."""
    reference: Any = None
    """Of the trajectory; None if it was played before the run was resumed."""
    reason: str = ""
    """Why it was given up."""
    recalled: bool = False
    """Does the journal have it already?"""


class Dispatcher:
    """Keeps one episode in flight per actor and survives the loss of actors.

    An actor is given an episode of the task it is at, if there is one, since to change tasks takes a second.

    Args:
        actors: handles of `RolloutActor`.
        absent: others that are not there yet, or not there any more; they play as soon as they are.
        scaling: its ``episode_timeout_s`` limits one episode, its ``wait_timeout_s`` the wait for lost actors when none
            is left.
        journal: where outcomes are noted before they are handed on; none by default.
        newest: tells the version of the newest weights. An episode that is on the disk, but not in the journal, and was
            played by newer ones is not taken: their checkpoint was given up.
    """

    def __init__(
        self,
        actors: Iterable[Any],
        scaling: ScalingConfig,
        journal: Journal | None = None,
        absent: Iterable[Any] = (),
        newest: Callable[[], int] | None = None,
    ) -> None:
        self.there = list(actors)
        """Actors that play, render, or have nothing to do."""
        self._journal = journal or Journal(None)
        self._newest = newest
        folder = self._journal.run_dir
        self._home = Home.here(folder, scaling.wait_timeout_s) if folder is not None else None
        self._idle = deque(self.there)
        self._at: dict[Any, str] = {}
        """The task that an actor is at."""
        self._rendering: dict[Any, Any] = {}
        """Of an actor that is to make frames, a call after them: it gets no episode before that returns."""
        self._absent: dict[Any, tuple[Any, Episode | None]] = {}
        """Actors that are not there, and the episode in which they died, by the reference of a call that returns when
        Ray has started them."""
        for actor in absent:
            self._expect(actor, None)
        self._nobody_since: float | None = None
        """Since when nobody plays."""
        self._timeout_s = scaling.episode_timeout_s
        self._restart_timeout_s = scaling.wait_timeout_s
        self._queue: deque[Episode] = deque()
        self._running: dict[Any, tuple[Any, Any, Episode]] = {}
        self._finished: deque[Outcome] = deque()
        """Not handed on yet."""
        self._dropped: dict[int, Episode] = {}
        """Dropped from the queue while earlier sessions are lived through again."""
        self._unwanted: set[int] = set()
        """Numbers of running episodes that are not tried again if they fail."""
        self._reasons: dict[Context, str] = {}
        """What an actor's watchdog said when it ended an episode."""
        self.errors: list[str] = []
        """Faults that were survived."""

    def submit(self, episode: Episode) -> None:
        """Queue an episode and start it if an actor is free."""
        episode.number = self._journal.next_number()
        self._queue.append(episode)
        self._start()

    def cancel(self, tags: set[int]) -> None:
        """Drop queued episodes of these groups; those that run are left to finish, but not tried again."""
        self.drop(lambda episode: episode.tag in tags)

    def drop(self, unwanted: Callable[[Episode], bool]) -> None:
        """Drop queued episodes that are unwanted; of those that run, those that fail."""
        self._unwanted |= {episode.number for _, _, episode in self._running.values() if unwanted(episode)}
        dropped = [episode for episode in self._queue if unwanted(episode)]
        self._queue = deque(episode for episode in self._queue if not unwanted(episode))
        if self._journal.replaying:  # some of them were being played then, and finished later
            self._dropped |= {episode.number: episode for episode in dropped}

    @property
    def outstanding(self) -> int:
        """Episodes queued, running, or finished and not handed on."""
        return len(self._queue) + len(self._running) + len(self._finished)

    @property
    def absent(self) -> list[Any]:
        """Actors that are not there."""
        return [actor for actor, _ in self._absent.values()]

    @property
    def starving(self) -> bool:
        """Is there an actor that nothing is left to do for?"""
        return not self._queue and any(actor not in self._rendering for actor in self._idle)

    def render(self, jobs: list[FrameJob]) -> list[Any]:
        """Have the actors make frames, in this order, before they play on; references in the order of the jobs.

        Those of an actor that is lost fail: the learner has another make them, and they are the same.
        """
        references = []
        asked = set()
        there = self.there or self.absent
        if not there:
            raise RuntimeError("no rollout actor is left to make frames")
        for turn, job in enumerate(jobs):
            fit = [actor for actor in there if self._at.get(actor) == job.env_id] or there
            actor = fit[turn % len(fit)]
            references.append(actor.render.remote(job))
            self._at[actor] = job.env_id
            asked.add(actor)
        self._rendering |= {actor: actor.awake.remote() for actor in asked}
        return references

    def next(self) -> Outcome | None:
        """The next episode that is finished, noted in the journal; None when none is outstanding.

        One that is given up is for the caller to note, once it has dealt with it.

        Raises:
            RuntimeError: when no actor is left, or one cannot play for a reason that is not its environment's.
            UserError: when one found a mistake in the input.
        """
        if self._journal.replaying:
            # Not all that was dropped was being played then.
            return self._recall() if self._queue or self._journal.upcoming in self._dropped else None
        self._start()  # what was only asked for while earlier sessions were lived through
        while not self._finished and self.outstanding:
            self._check_that_somebody_plays()
            self._wait()
        if not self._finished:
            return None
        outcome = self._finished.popleft()
        if outcome.report is not None:
            self._journal.played(outcome.episode.number, outcome.report)
        return outcome

    def _wait(self) -> None:
        """Wait a second for whatever comes first, and deal with it."""
        done, _ = ray.wait([*self._running, *self._absent, *self._rendering.values()], timeout=1.0)
        for reference in done:
            if reference in self._absent:
                self._welcome(reference)
            if reference not in self._running:
                continue
            actor, trajectory_ref, episode = self._running.pop(reference)
            try:
                report = ray.get(reference, timeout=self._timeout_s)
                self._finished.append(Outcome(episode, report, self._bring_here(trajectory_ref)))
                self._idle.append(actor)
            except RayTaskError as error:  # first: it is also of the kind of its cause
                if isinstance(error.cause, UserError):  # of whoever called the job, not of the environment
                    raise error.cause from None
                if isinstance(error.cause, (RayError, OSError)):
                    raise RuntimeError(
                        f"{actor} lost something it depends on, which is not its environment: {error.cause}"
                    ) from error
                self._idle.append(actor)
                self._retry(episode, actor, error)
            except (RayActorError, ObjectLostError) as error:
                _raise_if_the_driver_is_gone(error)
                self._expect(actor, episode)
                self._retry(episode, actor, error)
        self._end_overdue()
        self._start()

    def _recall(self) -> Outcome:
        """The next outcome of the journal, in the order in which they came; then the actors take over."""
        entry = self._journal.take("played", "given_up")
        number = -1 if entry is None else entry["number"]
        episode = self._dropped.get(number) or next((e for e in self._queue if e.number == number), None)
        if entry is None or episode is None or entry.get("context", plain(episode.context)) != plain(episode.context):
            raise UserError(
                "the journal of the run does not fit its configuration, or another version of the program wrote it; "
                "start anew, or go on from its newest checkpoint: train policy.checkpoint=RUN_DIR/checkpoints/NNNN"
            )
        if self._dropped.pop(episode.number, None) is None:
            self._queue.remove(episode)
        self._start()
        if entry["kind"] == "given_up":
            return Outcome(episode, None, reason=entry["reason"], recalled=True)
        return Outcome(episode, recorded_report(entry, episode.context), recalled=True)

    def _bring_here(self, trajectory: Any) -> Any:
        """The reference of a copy on this node, if there is none yet.

        Raises:
            ObjectLostError: when it was made on a node that has left in the meantime.
        """
        nodes = get_local_object_locations([trajectory]).get(trajectory, {}).get("node_ids")
        # A small one is on no node, but with its owner, this process.
        if not nodes or ray.get_runtime_context().get_node_id() in nodes:
            return trajectory
        return ray.put(ray.get(trajectory, timeout=self._timeout_s))

    def _expect(self, actor: Any, died_in: Episode | None) -> None:
        """Until Ray has started an actor each call would fail at once; this one is repeated till it is there."""
        self._absent[actor.awake.options(max_task_retries=-1).remote()] = actor, died_in
        self._at.pop(actor, None)
        if actor in self.there:
            self.there.remove(actor)

    def _welcome(self, reference: Any) -> None:
        actor, episode = self._absent.pop(reference)
        try:
            reason = ray.get(reference, timeout=self._timeout_s)
            if reason and episode is not None:
                self._reasons[episode.context] = reason
                self._survived(f"{episode.context}: {reason}")
            self._idle.append(actor)
            self.there.append(actor)
        except RayActorError as error:  # it cannot be started again; the others go on
            _raise_if_the_driver_is_gone(error)
            self._survived(f"a rollout actor is gone for good: {error}")

    def _check_that_somebody_plays(self) -> None:
        if self._running or self._rendering:
            self._nobody_since = None
            return
        self._nobody_since = self._nobody_since or time.monotonic()
        if not self._absent or time.monotonic() > self._nobody_since + self._restart_timeout_s:
            last = self.errors[-1] if self.errors else "none"
            raise RuntimeError(f"no rollout actor is left to play {self.outstanding} episodes; last error: {last}")

    def _start(self) -> None:
        if self._journal.replaying:
            return
        if self._rendering:
            made, _ = ray.wait(list(self._rendering.values()), num_returns=len(self._rendering), timeout=0)
            for actor in [actor for actor, after in self._rendering.items() if after in made]:
                self._end_of_rendering(actor)
        for actor in [actor for actor in self._idle if actor not in self._rendering]:
            episode = self._next_for(actor)
            if episode is None:
                continue
            self._idle.remove(actor)
            self._at[actor] = episode.context.env_id
            if not episode.attempts:
                self._journal.began(episode.number)
            episode.attempts += 1
            episode.deadline = time.monotonic() + self._timeout_s
            file = self._journal.episode_file(episode.number)
            report, trajectory = actor.collect.options(num_returns=2).remote(
                episode.context, episode.guidance, episode.exploring, file, self._home
            )
            self._running[report] = (actor, trajectory, episode)

    def _end_of_rendering(self, actor: Any) -> None:
        try:
            ray.get(self._rendering.pop(actor), timeout=self._timeout_s)
        except RayActorError as error:
            _raise_if_the_driver_is_gone(error)
            self._survived(f"a rollout actor was lost while it made frames: {error}")
            if actor in self._idle:  # else the end of its episode tells
                self._idle.remove(actor)
                self._expect(actor, None)

    def _was_finished(self, episode: Episode) -> bool:
        """Hand on what an actor wrote down before it, or an earlier session, was lost: too late for the journal."""
        file = self._journal.episode_file(episode.number)
        if file is None or not file.exists():
            return False
        try:
            trajectory = load_trajectory(file)
        except UserError:
            return False
        if trajectory.context != episode.context:
            return False
        if self._newest is not None and trajectory.policy_version > self._newest():
            return False
        self._finished.append(Outcome(episode, EpisodeReport.of(trajectory)))
        return True

    def _next_for(self, actor: Any) -> Episode | None:
        """Of the task that the actor is at, if there is one; what it could not play is for another, if there is one."""
        at = self._at.get(actor)
        while self._queue:
            fit = [i for i, episode in enumerate(self._queue) if not episode.failed_on or self._may_try(actor, episode)]
            if not fit:
                return None
            index = next((i for i in fit if at in (None, self._queue[i].context.env_id)), fit[0])
            episode = self._queue[index]
            del self._queue[index]
            if not self._was_finished(episode):
                return episode
        return None

    def _may_try(self, actor: Any, episode: Episode) -> bool:
        return actor not in episode.failed_on or episode.failed_on.issuperset(self.there)

    def _end_overdue(self) -> None:
        """A hung simulator cannot rescue itself: its process is killed, Ray starts it anew, the episode is retried."""
        overdue = [ref for ref, (_, _, episode) in self._running.items() if time.monotonic() > episode.deadline]
        # Nobody has looked for long, if the caller was busy otherwise: some may have finished in time.
        _, hung = ray.wait(overdue, num_returns=len(overdue), timeout=0) if overdue else ([], [])
        for actor, _, episode in [self._running[reference] for reference in hung]:
            episode.deadline = float("inf")  # its reference fails shortly and is then retried by `_wait`
            self._survived(f"{episode.context}: no result after {self._timeout_s:.0f} s, actor killed")
            ray.kill(actor, no_restart=False)

    def _retry(self, episode: Episode, actor: Any, error: Exception) -> None:
        episode.failed_on.add(actor)
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        self._survived(f"{episode.context}: {reason}")
        if episode.number in self._unwanted:
            return
        if episode.attempts < _MAX_ATTEMPTS:
            self._queue.appendleft(episode)
        elif not self._was_finished(episode):
            known = self._reasons.get(episode.context, reason)
            self._finished.append(Outcome(episode, None, reason=f"failed {_MAX_ATTEMPTS} times: {known}"))

    def _survived(self, fault: str) -> None:
        self._journal.fault(fault)
        self.errors.append(fault)


def _raise_if_the_driver_is_gone(error: RayError) -> None:
    if _OWNER_DIED in str(error):
        raise RuntimeError("the driver is gone, and its rollout actors with it") from error
