"""Signs of life: a process that hangs is ended like one that died, since nobody who waits for it can tell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray


class Heartbeats:
    """Asks actors whether they answer, without waiting for it.

    Args:
        actors: handles by name; each must be able to answer while it works.
        limit_s: one that takes longer is killed, unless it is still starting.
    """

    def __init__(self, actors: Mapping[str, Any], limit_s: float) -> None:
        self._actors = dict(actors)
        self._limit_s = limit_s
        self._asked = {name: (actor.__ray_ready__.remote(), float("inf")) for name, actor in actors.items()}

    def check(self) -> list[str]:
        """Ask those that answered last time again; what is said of those that were killed now."""
        faults = []
        for name, actor in list(self._actors.items()):
            reference, asked = self._asked[name]
            if ray.wait([reference], timeout=0)[0]:
                self._asked[name] = actor.__ray_ready__.remote(), time.monotonic()
            elif time.monotonic() - asked > self._limit_s:
                ray.kill(actor)
                del self._actors[name]
                faults.append(f"{name} gave no sign of life for {self._limit_s:g} s and was killed")
        return faults
