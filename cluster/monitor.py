"""What a person sees of a running job, who hears of its metrics, and who ends it when it stands still."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cluster.heartbeats import Heartbeats
from ript_ray.config import ScalingConfig
from ript_ray.reporting import progress_bar

log = logging.getLogger("ript_ray")

_ANSWER_S = 5.0
"""That the coordinator has to answer once; whether it lives is for `Heartbeats` to say."""
_INTERRUPT = signal.SIGUSR1
"""Takes the main thread out of whatever it waits for."""


class Monitor:
    """The progress bar, the log and others who listen, fed once a second from the coordinator.

    It also looks after the job: the coordinator and others are killed when they give no sign of life; and when nothing
    is played or learnt for ``scaling.wait_timeout_s`` a `TimeoutError` is raised in the main thread, whatever that is
    waiting for, as is what ends the monitor itself. When it ends the coordinator notes nothing more.

    Args:
        coordinator: handle of a `Coordinator`.
        scaling: its time limits.
        listeners: called with each new row of metrics. One that fails is noted in the log; the run goes on.
        others: handles of actors that must answer as the coordinator must, by name.
        faults: takes what was said of those that were killed.
    """

    def __init__(
        self,
        coordinator: Any,
        scaling: ScalingConfig,
        listeners: Sequence[Callable[[dict[str, Any]], Any]] = (),
        others: Mapping[str, Any] | None = None,
        faults: list[str] | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._coordinator = coordinator
        self._scaling = scaling
        self._heartbeats = Heartbeats({"Coordinator": coordinator} | dict(others or {}), scaling.heartbeat_timeout_s)
        self._faults = [] if faults is None else faults
        self._listeners = listeners
        self._collecting: Any = None
        self._pool: Any = None
        self._failure: Exception | None = None
        self._stalled: Exception | None = None
        self._last: tuple[Any, ...] = ()
        self._moved = time.monotonic()
        """When something was played or learnt last."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)
        self._bar = progress_bar(1.0, bar_format="{percentage:3.0f}% |{bar}| {desc} [{elapsed}<{remaining}]")

    def __enter__(self) -> Monitor:
        self._before = signal.signal(_INTERRUPT, self._interrupt)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        if not self._thread.is_alive():  # without a handler its signal would end this process
            signal.signal(_INTERRUPT, self._before)
        reason = self._stalled if kind is KeyboardInterrupt else None
        if reason is None:
            self._poll()
        with contextlib.suppress(ray.exceptions.RayError):  # of a coordinator that is gone, or works on
            ray.get(self._coordinator.close.remote(), timeout=_ANSWER_S)
        with contextlib.suppress(OSError):
            self._bar.close()
        if reason is not None:
            raise reason

    def watch(self, collecting: Any, pool: Any) -> None:
        """End the learners when the collection of samples fails, instead of letting them wait for it."""
        self._collecting, self._pool = collecting, pool

    def raise_if_collecting_failed(self) -> None:
        """Raise the coordinator's own error, which explains the learners'."""
        if self._failure is not None:
            raise self._failure

    def _interrupt(self, *_: object) -> None:
        if not self._stop.is_set():
            raise KeyboardInterrupt  # Ray lets nothing else out of its waits

    def _loop(self) -> None:
        try:
            while not self._stop.wait(1.0):
                self._look()
        except Exception as error:  # without supervision the job must not go on: its waits would have no end
            log.exception("the monitor ends the job")
            self._stalled = error
            signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)

    def _look(self) -> None:
        for fault in self._heartbeats.check():
            log.error(fault)
            self._faults.append(fault)
        self._poll()
        limit = self._scaling.wait_timeout_s
        if time.monotonic() - self._moved > limit:
            raise TimeoutError(
                f"nothing was played or learnt for {limit:.0f} s; the job was at: {self._bar.desc}; if it needs so "
                "long, raise scaling.wait_timeout_s"
            )

    def _poll(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # of a lost coordinator, which `collecting` tells
            self._show(ray.get(self._coordinator.progress.remote(len(self.rows)), timeout=_ANSWER_S))
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
        if (now := (state["stage"], state["done"], state["fraction"], len(self.rows))) != self._last:
            self._last, self._moved = now, time.monotonic()
        self._bar.set_description_str(f"{state['stage']} {state['done']}/{state['expected']}", refresh=False)
        self._bar.initial = state["earlier"]
        with contextlib.suppress(OSError):  # of a terminal that is gone
            self._bar.update(round(state["fraction"], 4) - self._bar.n)
