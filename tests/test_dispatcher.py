"""Outcomes that a journal holds, lived through again; and actors that go with the driver that has started them."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import make_policy, make_trajectory
from ray.exceptions import RayActorError

from actors.coordinator import Coordinator
from actors.dispatcher import Dispatcher, Episode
from actors.journal import Journal, read_journal
from ript_ray.config import Config, ScalingConfig
from ript_ray.data.storage import save_episode
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import save_policy
from ript_ray.types import Context, EpisodeRecord, EpisodeReport, FrameJob, Trajectory

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

BROKEN = [Context("libero_object/0", 25, seed) for seed in (1, 2)]
FINE = Context("libero_object/0", 26, 3)


def report(context: Context) -> EpisodeReport:
    trajectory = make_trajectory(20)
    trajectory.context = context
    return EpisodeReport.of(trajectory)


def test_what_was_dropped_and_never_played_does_not_stand_in_the_way_of_the_next_stage(tmp_path: Path) -> None:
    journal = Journal(tmp_path)  # two from a state that fails, of which the second is not played; then another stage
    journal.given_up(0, "failed 3 times")
    journal.played(2, report(FINE))
    del journal  # which others may not read meanwhile
    again = Journal(tmp_path)
    first = Dispatcher([], ScalingConfig(), again)
    for context in BROKEN:
        first.submit(Episode(-1, context, guidance=1.0))
    outcome = first.next()
    assert outcome is not None
    assert (outcome.report, outcome.reason) == (None, "failed 3 times")
    first.drop(lambda episode: episode.context in BROKEN)
    assert first.next() is None
    second = Dispatcher([], ScalingConfig(), again)
    second.submit(Episode(-1, FINE, guidance=1.0))
    outcome = second.next()
    assert outcome is not None
    assert outcome.report is not None
    assert outcome.report.context == FINE


def test_what_was_dropped_while_it_was_played_is_handed_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.given_up(0, "failed 3 times")
    journal.played(1, report(BROKEN[1]))  # another actor had begun it before
    del journal
    again = Journal(tmp_path)
    dispatcher = Dispatcher([], ScalingConfig(), again)
    for context in BROKEN:
        dispatcher.submit(Episode(-1, context, guidance=1.0))
    dispatcher.next()
    dispatcher.drop(lambda episode: episode.context in BROKEN)
    outcome = dispatcher.next()
    assert outcome is not None
    assert outcome.report is not None
    assert outcome.report.context == BROKEN[1]


@ray.remote(num_cpus=0)
class Player:
    """Never ends an episode."""

    def awake(self) -> str:
        return ""

    def collect(self, *_: Any) -> tuple[None, None]:
        time.sleep(600)
        return None, None


@ray.remote(num_cpus=0)
class Driver:
    """Owns players, as the process does that starts a run."""

    def players(self, count: int) -> list[Any]:
        self._players = [Player.options(max_restarts=-1).remote() for _ in range(count)]
        ray.get([player.awake.remote() for player in self._players], timeout=60)
        return self._players


def test_that_actors_go_with_their_driver_is_no_fault_of_the_run(tmp_path: Path) -> None:
    driver = Driver.remote()
    players = ray.get(driver.players.remote(3), timeout=120)
    dispatcher = Dispatcher(players, ScalingConfig(), Journal(tmp_path))
    dispatcher.submit(Episode(-1, FINE, guidance=1.0))
    ray.kill(driver)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        dispatcher.next()
    assert dispatcher.errors == []
    assert [entry["kind"] for entry in read_journal(tmp_path)] == ["session", "began"]


@ray.remote(num_cpus=0, max_restarts=-1)
class Leaver:
    """Writes its episode down, and is gone before anybody hears of it."""

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory

    def awake(self) -> str:
        return ""

    def collect(self, context: Context, _guidance: float, _exploring: bool, file: Path, _home: Any) -> None:
        with file.parent.with_name("calls").open("a") as calls:
            calls.write("x")
        self._trajectory.context = context
        save_episode(file, EpisodeRecord.of(self._trajectory, 60), self._trajectory)
        os._exit(1)


@ray.remote(num_cpus=0)
class Breaker:
    """Fails at every episode."""

    def collect(self, *_: Any) -> tuple[None, None]:
        raise ValueError("broken")


@ray.remote(num_cpus=0)
class Quick:
    """Plays at once; what is wrong with the world is the user's mistake."""

    def __init__(self, played: EpisodeReport, mistake: str = "") -> None:
        self._played, self._mistake = played, mistake

    def awake(self) -> str:
        return ""

    def collect(self, context: Context, *_: Any) -> tuple[EpisodeReport, str]:
        if self._mistake:
            raise UserError(self._mistake)
        return dataclasses.replace(self._played, context=context), "a trajectory"


def test_what_had_finished_when_nobody_looked_did_not_hang(tmp_path: Path) -> None:
    actors = [Quick.remote(report(FINE)) for _ in range(3)]
    ray.get([actor.awake.remote() for actor in actors], timeout=60)
    dispatcher = Dispatcher(actors, ScalingConfig(episode_timeout_s=2.0), Journal(tmp_path))
    for seed in range(3):
        dispatcher.submit(Episode(-1, Context("libero_object/0", 25, seed), guidance=1.0))
    time.sleep(4.0)  # as a coordinator that waits for weights
    outcomes = [dispatcher.next() for _ in range(3)]
    assert all(outcome is not None and outcome.report is not None for outcome in outcomes)
    assert dispatcher.errors == []
    for actor in actors:
        ray.kill(actor)


def test_a_users_mistake_is_told_and_not_tried_again(tmp_path: Path) -> None:
    actor = Quick.remote(report(FINE), "env.id=mine: step() returned no info['success']")
    dispatcher = Dispatcher([actor], ScalingConfig(), Journal(tmp_path))
    dispatcher.submit(Episode(-1, FINE, guidance=1.0))
    with pytest.raises(UserError, match=r"^env\.id=mine: step\(\) returned no info"):
        dispatcher.next()
    assert dispatcher.errors == []
    ray.kill(actor)


def test_a_run_that_ended_since_nothing_could_be_played_goes_on_once_that_is_mended(tmp_path: Path) -> None:
    config = Config.model_validate({"eval": {"episodes": 4}})

    def evaluated(actor: Any) -> list[bool | None]:
        coordinator = Coordinator.remote(config, [actor], None, None, tmp_path)
        try:
            return ray.get(coordinator.evaluate.remote("evaluating"), timeout=120)["results"]["held_out"]
        finally:
            for handle in (coordinator, actor):
                ray.kill(handle)

    with pytest.raises(RuntimeError, match="the environments of all tasks fail again and again"):
        evaluated(Breaker.remote())
    results = evaluated(Quick.remote(report(FINE)))
    assert results == [None, None, True, True]  # two had been set aside before the third was too much


@ray.remote(num_cpus=0)
class Painter:
    """Takes a while to make frames."""

    def __init__(self, played: EpisodeReport) -> None:
        self._played = played

    def awake(self) -> str:
        return ""

    def render(self, job: FrameJob) -> str:
        time.sleep(3.0)
        return job.env_id

    def collect(self, context: Context, *_: Any) -> tuple[EpisodeReport, str]:
        return dataclasses.replace(self._played, context=context), "a trajectory"


def test_an_actor_that_is_lost_while_it_makes_frames_is_known_to_be_gone(tmp_path: Path) -> None:
    gone, other = (Painter.remote(report(FINE)) for _ in range(2))
    ray.get([gone.awake.remote(), other.awake.remote()], timeout=60)
    dispatcher = Dispatcher([gone, other], ScalingConfig(), Journal(tmp_path))
    lost, made = dispatcher.render([FrameJob("a", ()), FrameJob("b", ())])
    ray.kill(gone)
    for seed in range(3):
        dispatcher.submit(Episode(-1, Context("libero_object/0", 25, seed), guidance=1.0))
    outcomes = [dispatcher.next() for _ in range(3)]
    assert all(outcome is not None and outcome.report is not None for outcome in outcomes)
    assert dispatcher.there == [other]
    assert any("lost while it made frames" in error for error in dispatcher.errors), dispatcher.errors
    assert ray.get(made, timeout=60) == "b"
    with pytest.raises(RayActorError):
        ray.get(lost, timeout=60)
    ray.kill(other)


@pytest.mark.parametrize("wanted", [True, False])
def test_what_runs_and_is_not_wanted_any_more_is_not_tried_again(wanted: bool, tmp_path: Path) -> None:
    breaker = Breaker.remote()
    dispatcher = Dispatcher([breaker], ScalingConfig(), Journal(tmp_path))
    dispatcher.submit(Episode(7, FINE, guidance=1.0))
    dispatcher.cancel({8 if wanted else 7})
    outcome = dispatcher.next()
    if wanted:
        assert outcome is not None
        assert "failed 3 times" in outcome.reason
    else:
        assert outcome is None
    assert len(dispatcher.errors) == (3 if wanted else 1)
    ray.kill(breaker)


def test_what_an_actor_wrote_down_before_it_died_is_not_played_again(tmp_path: Path) -> None:
    dispatcher = Dispatcher([Leaver.remote(make_trajectory(20))], ScalingConfig(), Journal(tmp_path))
    dispatcher.submit(Episode(-1, FINE, guidance=1.0))
    outcome = dispatcher.next()
    assert outcome is not None
    assert outcome.report is not None
    assert outcome.report.context == FINE
    assert len(dispatcher.errors) == 1
    assert (tmp_path / "calls").read_text() == "x"


def test_what_weights_played_that_were_given_up_is_played_again(tmp_path: Path) -> None:
    trajectory = make_trajectory(20, version=3)
    trajectory.context = FINE
    (tmp_path / "episodes").mkdir()
    save_episode(tmp_path / "episodes/000000.safetensors", EpisodeRecord.of(trajectory, 60), trajectory)
    player = Player.remote()
    for newest in (2, 3):
        journal = Journal(tmp_path)
        dispatcher = Dispatcher([player], ScalingConfig(), journal, newest=lambda newest=newest: newest)
        dispatcher.submit(Episode(-1, FINE, guidance=1.0))
        if newest == 2:
            del journal, dispatcher
    assert [entry["kind"] for entry in read_journal(tmp_path)] == ["session", "began", "session"]
    outcome = dispatcher.next()
    assert outcome is not None
    assert outcome.report is not None
    assert outcome.report.policy_version == 3
    ray.kill(player)


def test_policies_that_have_played_to_be_compared_must_be_there(tmp_path: Path) -> None:
    save_policy(tmp_path / "checkpoints/0002", make_policy())
    journal = Journal(tmp_path)
    journal.settle("candidates", [1, 2])  # and then the first was damaged
    del journal

    def asked() -> list[int]:
        coordinator = Coordinator.remote(Config(), [], None, None, tmp_path)
        try:
            return ray.get(coordinator.candidates.remote(2), timeout=60)
        finally:
            ray.kill(coordinator)

    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes/000000.safetensors").write_bytes(b"played by the first, and nobody heard of it")
    assert asked() == [2]  # nobody had played
    assert not list((tmp_path / "episodes").iterdir())
    journal = Journal(tmp_path)
    assert journal.settle("candidates", [1, 2]) == [2]
    journal.played(0, report(FINE))
    del journal
    assert asked() == [2]  # the same as then
    journal = Journal(tmp_path)
    journal.settle("candidates", [1, 2], anew=True)
    del journal
    with pytest.raises(UserError, match=r"policies of the updates \[1\] were being compared"):
        asked()


def test_a_journal_knows_what_was_begun_in_earlier_sessions(tmp_path: Path) -> None:
    for numbers in ((0, 1, 2), (1, 2, 3), (2, 4)):
        journal = Journal(tmp_path)
        for number in numbers:
            journal.began(number)
        last = journal.played_again
        del journal
    assert last == [1, 2, 2]


def test_a_journal_that_is_closed_takes_nothing_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.fault("seen")
    journal.close()
    with pytest.raises(RuntimeError, match="the session has ended"):  # hence nobody hears of an outcome
        journal.given_up(0, "failed 3 times")
    assert [entry.get("text") for entry in read_journal(tmp_path)] == [None, "seen"]
