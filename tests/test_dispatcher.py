"""Outcomes that a journal holds, lived through again; no actor plays here."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_trajectory

from actors.dispatcher import Dispatcher, Episode
from actors.journal import Journal
from ript_ray.config import ScalingConfig
from ript_ray.types import Context, EpisodeReport

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
