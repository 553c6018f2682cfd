"""What a person sees of a running job, and who hears of its metrics."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from tqdm import tqdm

log = logging.getLogger("ript_ray")


class Monitor:
    """The progress bar, the log and others who listen, fed once a second from the coordinator.

    Args:
        coordinator: handle of a `Coordinator`.
        listeners: called with each new row of metrics. One that fails is noted in the log; the run goes on.
    """

    def __init__(self, coordinator: Any, listeners: Sequence[Callable[[dict[str, Any]], Any]] = ()) -> None:
        self.rows: list[dict[str, Any]] = []
        self._coordinator = coordinator
        self._listeners = listeners
        self._collecting: Any = None
        self._pool: Any = None
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)
        self._bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar}| {desc} [{elapsed}<{remaining}]")

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        self._poll()
        self._bar.close()

    def watch(self, collecting: Any, pool: Any) -> None:
        """End the learners when the collection of samples fails, instead of letting them wait for it."""
        self._collecting, self._pool = collecting, pool

    def raise_if_collecting_failed(self) -> None:
        """Raise the coordinator's own error, which explains the learners'."""
        if self._failure is not None:
            raise self._failure

    def _loop(self) -> None:
        while not self._stop.wait(1.0):
            self._poll()

    def _poll(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # of a lost coordinator, which `collecting` tells
            self._show(ray.get(self._coordinator.progress.remote(len(self.rows)), timeout=60))
        if self._collecting is not None and ray.wait([self._collecting], timeout=0)[0]:
            collecting, self._collecting = self._collecting, None
            try:
                ray.get(collecting)
            except Exception as error:  # handed to the main thread, which raises it
                self._failure = error
                self._pool.finish.remote(0)

    def _show(self, state: dict[str, Any]) -> None:
        for row in state["rows"]:
            self.rows.append(row)
            log.info(", ".join(f"{name} {value:.6g}" for name, value in row.items() if name != "time"))
            for listener in self._listeners:
                try:
                    listener(row)
                except Exception:
                    log.exception("%s did not take a row of metrics", type(listener).__name__)
        self._bar.set_description_str(f"{state['stage']} {state['done']}/{state['expected']}", refresh=False)
        self._bar.n = round(state["fraction"], 4)
        self._bar.refresh()
