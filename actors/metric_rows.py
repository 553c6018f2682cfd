"""The rows of ``metrics.jsonl``."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from ript_ray.data.lines import append_json_line, read_json_lines


class MetricRows:
    """Metrics of each update, of rollouts and of the learner in rows of their own; from any thread.

    Args:
        file: gets each row as a line, and has those of earlier sessions; None keeps them in memory alone.
    """

    def __init__(self, file: Path | None) -> None:
        self._lock = threading.Lock()
        self._file = file
        self._rows = [] if file is None else read_json_lines(file, repair=True)
        self._known = {_key(row) for row in self._rows}

    def add(self, row: dict[str, Any]) -> None:
        """Add a row with the time, unless an earlier session had it."""
        with self._lock:
            if _key(row) in self._known:
                return
            timed = {"time": time.time()} | row
            if self._file is not None:
                append_json_line(self._file, timed)
            self._known.add(_key(row))
            self._rows.append(timed)

    def after(self, seen: int) -> list[dict[str, Any]]:
        """All but the first ``seen``."""
        with self._lock:
            return self._rows[seen:]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The update and the sections of a row: there is one row of each."""
    return row["update"], *sorted({name.partition("/")[0] for name in row if "/" in name})
