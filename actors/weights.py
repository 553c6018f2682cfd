"""The weight store: one object per version, shared by all processes of a node, pulled by whoever needs it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import ray

WeightArrays = dict[str, np.ndarray]


_KEEP = 3
"""Versions kept. Older ones are freed once the actors that still act with them have pulled a newer one."""


@ray.remote(num_cpus=0)
class WeightStore:
    """Holds the newest weights. It owns the objects, so a learner that dies takes nothing with it."""

    def __init__(self) -> None:
        self._objects: dict[int, ray.ObjectRef[WeightArrays]] = {}
        self._sha256: dict[int, str] = {}
        self._newer = asyncio.Condition()

    def __repr__(self) -> str:
        return "WeightStore"

    async def publish(self, version: int, weights: WeightArrays, sha256: str) -> None:
        """Make ``version`` the newest. Publishing a version again (after a restart) replaces it."""
        self._objects[version] = ray.put(weights)
        self._sha256[version] = sha256
        for old in sorted(self._objects)[:-_KEEP]:
            del self._objects[old]
        async with self._newer:
            self._newer.notify_all()

    async def newest(self, than: int) -> tuple[int, list[Any]] | None:
        """``(version, [reference])`` when there is one newer than ``than``. A bare reference would be fetched here."""
        version = max(self._objects, default=-1)
        return (version, [self._objects[version]]) if version > than else None

    async def wait_for(self, version: int, timeout_s: float) -> bool:
        """True as soon as ``version`` or a newer one is published, False after ``timeout_s``."""
        async with self._newer:
            try:
                await asyncio.wait_for(
                    self._newer.wait_for(lambda: max(self._objects, default=-1) >= version), timeout_s
                )
            except TimeoutError:
                return False
        return True

    async def newest_version(self) -> tuple[int, str]:
        """Number and fingerprint of the newest weights."""
        version = max(self._objects)
        return version, self._sha256[version]
