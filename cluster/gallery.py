"""Short videos of the newest failures and successes of a run, for its report page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray

from ript_ray.report import CAPTIONS, VIDEOS
from ript_ray.reporting import write_json, write_video

_KEPT = 8
_TIMEOUT_S = 120.0
_EVERY, _SIZE = 4, 128
_FRAMES_PER_SECOND = 10.0


class Gallery:
    """Films one failure and one success of each update, while the learner trains, and keeps the newest.

    Args:
        coordinator: handle of a `Coordinator`, which knows the newest rollouts, and who can film.
        run_dir: the videos go into its ``videos`` folder.
    """

    def __init__(self, coordinator: Any, run_dir: Path) -> None:
        self._coordinator = coordinator
        self._folder = run_dir / VIDEOS
        captions = self._folder / CAPTIONS
        self._captions: list[dict[str, Any]] = json.loads(captions.read_text())[::-1] if captions.exists() else []

    def __call__(self, row: dict[str, Any]) -> None:
        """Film after the rollouts of an update."""
        if "rollout/episodes" not in row:
            return
        self._folder.mkdir(exist_ok=True)
        update = row["update"]
        newest = ray.get(self._coordinator.newest.remote(), timeout=_TIMEOUT_S)
        actors = ray.get(self._coordinator.present.remote(), timeout=_TIMEOUT_S)
        for success, (at, (reference,)) in newest.items():
            if at != update:
                continue
            name = f"{update:05d}-{'success' if success else 'failure'}.mp4"
            frames = ray.get(actors[update % len(actors)].film.remote(reference, _EVERY, _SIZE), timeout=_TIMEOUT_S)
            write_video(self._folder / name, frames, _FRAMES_PER_SECOND)
            instruction = ray.get(reference, timeout=_TIMEOUT_S).instruction
            caption = {"file": f"{VIDEOS}/{name}", "update": update, "success": success, "instruction": instruction}
            self._captions = [c for c in self._captions if c["file"] != caption["file"]] + [caption]
        for old in self._captions[:-_KEPT]:
            (self._folder.parent / old["file"]).unlink(missing_ok=True)
        self._captions = self._captions[-_KEPT:]
        write_json(self._folder / CAPTIONS, self._captions[::-1])
