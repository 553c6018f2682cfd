"""The journal of a run: what happened, in order, one JSON line each. To resume is to live through it again.

Everything that the coordinator decides follows from its configuration and from what came back to it: outcomes of
episodes, and the moments at which a collection ended. Both are written down before they count. A resumed run takes
the same way as the first, with outcomes from here in the place of actors that play, until the journal ends; from there
on it goes on by itself. Skip lists, open groups, accepted samples and counters need no snapshots of their own.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ript_ray.data.lines import read_json_lines
from ript_ray.errors import UserError
from ript_ray.locks import take_lock
from ript_ray.types import Context, EpisodeReport

_NAME = "journal.jsonl"
_LOCK_TIMEOUT_S = 60.0


class Journal:
    """Appends to ``journal.jsonl`` of a run directory; what was there before is to be lived through first.

    Args:
        run_dir: of the run; None keeps nothing.

    Raises:
        UserError: when a line other than the last cannot be read, or another process goes on writing.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self._file = None if run_dir is None else run_dir / _NAME
        self._episodes = None if run_dir is None else run_dir / "episodes"
        self.sessions = 1
        """How often the run was started, this time included."""
        self.faults: list[str] = []
        """That earlier sessions survived."""
        self.played_again: list[int] = []
        """Numbers of episodes that were under way when a session ended, and begun anew in a later one."""
        self._begun: set[int] = set()
        """Numbers of episodes that earlier sessions began."""
        self._past: deque[dict[str, Any]] = deque()
        self._settled: dict[str, Any] = {}
        self._number = 0
        self.seconds_before = 0.0
        """Length of earlier sessions."""
        self._closed = False
        if self._file is None:
            return
        self._out = self._file.open("a")
        _lock(self._out)
        began = 0.0
        for entry in read_json_lines(self._file, repair=True):
            self.seconds_before += max(0.0, entry["time"] - began) if entry["kind"] != "session" else 0.0
            began = entry["time"]
            if entry["kind"] == "session":
                self.sessions += 1
            elif entry["kind"] == "fault":
                self.faults.append(entry["text"])
            elif entry["kind"] == "settled":
                self._settled[entry["name"]] = entry["value"]
            elif entry["kind"] == "began":
                self._note_again(entry["number"])
                self._begun.add(entry["number"])
            else:
                self._past.append(entry)
        self._write("session")

    @property
    def replaying(self) -> bool:
        """Is there anything left of earlier sessions?"""
        return bool(self._past)

    @property
    def upcoming(self) -> int | None:
        """The number of the episode whose outcome is next among what is left of earlier sessions, if one is."""
        return self._past[0].get("number") if self._past else None

    def settle(self, name: str, value: Any, anew: bool = False) -> Any:
        """Something that must not change while the run lasts: ``value``, or, unless it is settled ``anew``, what an
        earlier session had.
        """
        if anew or name not in self._settled:
            self._settled[name] = value
            self._write("settled", name=name, value=value)
        return self._settled[name]

    def next_number(self) -> int:
        """The number of the next episode that is asked for."""
        self._number += 1
        return self._number - 1

    def episode_file(self, number: int) -> Path | None:
        """Where an episode is recorded."""
        return None if self._episodes is None else self._episodes / f"{number:06d}.safetensors"

    def discard_unnoted(self) -> None:
        """Remove recordings of episodes that nobody has asked for in this session: what comes next is another."""
        for file in [] if self._episodes is None else self._episodes.glob("*.safetensors"):
            if file.stem.isdecimal() and int(file.stem) >= self._number:
                file.unlink()

    def began(self, number: int) -> None:
        """Note that a session plays an episode; not where replaying gets to, since clocks decide when it comes."""
        self._note_again(number)
        self._write("began", number=number)

    def played(self, number: int, report: EpisodeReport) -> None:
        """Note that an episode was played."""
        rest = {f.name: getattr(report, f.name) for f in fields(report) if f.name not in ("context", "frame_steps")}
        where = plain(report.context)
        self._write("played", number=number, context=where, report=rest, steps=report.frame_steps.tolist())

    def given_up(self, number: int, reason: str) -> None:
        """Note that an episode failed for good."""
        self._write("given_up", number=number, reason=reason)

    def fault(self, text: str) -> None:
        """Note a fault that was survived."""
        self._write("fault", text=text)

    def opened(self) -> None:
        """Note that a group was opened at a moment that timing decided."""
        self._write("opened")

    def collected(self, step: int, ended_by: str, seconds: float) -> None:
        """Note that the rollouts of an update are complete."""
        self._write("collected", step=step, ended_by=ended_by, seconds=seconds)

    def take(self, *kinds: str) -> dict[str, Any] | None:
        """The next entry of the past if it is one of these kinds; it counts as lived through."""
        return self._past.popleft() if self._past and self._past[0]["kind"] in kinds else None

    def close(self) -> None:
        """Note nothing any more: whoever tries meets a RuntimeError, before anyone acts on what was not noted."""
        self._closed = True

    def _note_again(self, number: int) -> None:
        if number in self._begun:
            self.played_again.append(number)

    def _write(self, kind: str, **values: Any) -> None:
        if self._closed:
            raise RuntimeError("the session has ended")
        if self._file is not None:
            self._out.write(json.dumps({"kind": kind, "time": time.time()} | values) + "\n")
            self._out.flush()


def plain(context: Context) -> list[str | int | None]:
    """A context as the journal has it: what an outcome belongs to, should the configuration be another by then."""
    return list(astuple(context))


def recorded_report(entry: dict[str, Any], context: Context) -> EpisodeReport:
    """The report of a ``played`` entry."""
    return EpisodeReport(context=context, frame_steps=np.array(entry["steps"], dtype=np.int32), **entry["report"])


def _lock(file: TextIO) -> None:
    """Be the only one who writes. A killed run's processes may live for some seconds more."""
    if not take_lock(file, _LOCK_TIMEOUT_S):
        raise UserError(f"{file.name}: another process is writing it; is the run still going on?")


def wait_until_free(run_dir: Path) -> None:
    """Return when no other process writes the journal of a run.

    Raises:
        UserError: when one goes on doing so.
    """
    with (run_dir / _NAME).open("a") as file:
        _lock(file)


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """All entries of a run so far, while it goes on or later."""
    return read_json_lines(run_dir / _NAME)


def work_done(run_dir: Path) -> int:
    """Outcomes that the journal holds, and updates."""
    updates = (int(path.name) for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdecimal())
    return journal_holds(run_dir, "played", "collected") + max(updates, default=0)


def journal_holds(run_dir: Path, *kinds: str) -> int:
    """How many entries of these kinds there are, whole or not: for those who ask often."""
    file = run_dir / _NAME
    text = file.read_bytes() if file.exists() else b""
    return sum(text.count(b'{"kind": "%s"' % kind.encode()) for kind in kinds)
