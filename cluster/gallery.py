"""Short videos of the newest failures and successes of a run, for its report page."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from pathlib import Path
from typing import Any, Self

import ray

from ript_ray.report import CAPTIONS, VIDEOS
from ript_ray.reporting import write_json, write_video

log = logging.getLogger("ript_ray")

_KEPT = 8
_TIMEOUT_S = 120.0
_STOP_S = 10.0
_EVERY, _SIZE = 4, 128
_FRAMES_PER_SECOND = 10.0


class Gallery:
    """Films one failure and one success of each update, while the learner trains, and keeps the newest.

    In a thread of its own: actors that are busy hold up nobody who looks after the run. To be used in a ``with`` block,
    which films what is left when it ends, unless by an exception.

    Args:
        coordinator: handle of a `Coordinator`, which knows the newest rollouts, and who can film.
        run_dir: the videos go into its ``videos`` folder.
    """

    def __init__(self, coordinator: Any, run_dir: Path) -> None:
        self._coordinator = coordinator
        self._folder = run_dir / VIDEOS
        captions = self._folder / CAPTIONS
        self._captions: list[dict[str, Any]] = json.loads(captions.read_text())[::-1] if captions.exists() else []
        self._updates: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="gallery", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._updates.put(None)
        if kind is None:
            self._thread.join(timeout=_TIMEOUT_S)
        self._stopped = True
        self._thread.join(timeout=_STOP_S)  # it must not ask Ray for anything once that is shut down

    def __call__(self, row: dict[str, Any]) -> None:
        """Film after the rollouts of an update, when it is its turn."""
        if "rollout/episodes" in row:
            self._updates.put(row["update"])

    def _loop(self) -> None:
        while (update := self._updates.get()) is not None and not self._stopped:
            try:
                self._film(update)
            except Exception:  # whatever it is, the run goes on
                if not self._stopped:
                    log.exception("update %d was not filmed", update)

    def _film(self, update: int) -> None:
        self._folder.mkdir(exist_ok=True)
        newest = self._get(self._coordinator.newest.remote())
        actors = self._get(self._coordinator.present.remote())
        for success, (at, (reference,)) in newest.items():
            if at != update:
                continue
            name = f"{update:05d}-{'success' if success else 'failure'}.mp4"
            frames = self._get(actors[update % len(actors)].film.remote(reference, _EVERY, _SIZE))
            instruction = self._get(reference).instruction
            write_video(self._folder / name, frames, _FRAMES_PER_SECOND)
            caption = {"file": f"{VIDEOS}/{name}", "update": update, "success": success, "instruction": instruction}
            self._captions = [c for c in self._captions if c["file"] != caption["file"]] + [caption]
        for old in self._captions[:-_KEPT]:
            (self._folder.parent / old["file"]).unlink(missing_ok=True)
        self._captions = self._captions[-_KEPT:]
        write_json(self._folder / CAPTIONS, self._captions[::-1])

    def _get(self, reference: Any) -> Any:
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._stopped:
            if ray.wait([reference], timeout=1.0)[0]:
                return ray.get(reference)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {_TIMEOUT_S:.0f} s")
        raise InterruptedError("the run ends")
