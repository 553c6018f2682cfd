"""The weight store: one object per version, shared by all processes of a node, pulled by whoever needs it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import numpy as np
import ray
import torch

from ript_ray.policies.checkpoints import build_policy, from_published
from ript_ray.policies.policy import Policy

log = logging.getLogger("ript_ray")

WeightArrays = dict[str, np.ndarray]


_KEEP = 2
"""Versions kept. Older ones are freed once the actors that still act with them have pulled a newer one."""


@ray.remote(num_cpus=0)
class WeightStore:
    """Holds the newest weights. It owns the objects, so a learner that dies takes nothing with it."""

    def __init__(self) -> None:
        self._objects: dict[int, ray.ObjectRef[WeightArrays]] = {}
        self._sha256: dict[int, str] = {}
        self._owned = -1
        """The newest version that outlives its learner."""
        self._newer = asyncio.Condition()

    def __repr__(self) -> str:
        return "WeightStore"

    async def publish(self, version: int, lent: list[Any], sha256: str) -> None:
        """Make ``version`` the newest; publishing a version again (after a restart) replaces it.

        Args:
            version: of the weights.
            lent: ``[reference]`` of the arrays, which the learner owns and may let go when this has returned. Actors
                pull it while the store makes its own copy, so that they need not wait for that; those that do keep it
                in memory until they pull the next.
            sha256: fingerprint of the policy.
        """
        (reference,) = lent
        weights = await reference  # mapped: it outlives the learner
        self._objects[version], self._sha256[version] = reference, sha256
        for old in sorted(self._objects)[:-_KEEP]:
            del self._objects[old], self._sha256[old]
        try:
            self._objects[version] = await asyncio.to_thread(ray.put, weights)
        except BaseException:  # nobody may count on what dies with the learner
            del self._objects[version], self._sha256[version]
            raise
        async with self._newer:
            self._owned = max(version, self._owned)
            self._newer.notify_all()

    async def newer_than(self, version: int) -> tuple[int, list[Any]] | None:
        """The newest version with its reference, if it is newer: ``(version, [reference])``. A bare reference would be
        fetched here.
        """
        newest = max(self._objects, default=-1)
        return (newest, [self._objects[newest]]) if newest > version else None

    async def wait_for(self, version: int, timeout_s: float) -> bool:
        """True as soon as ``version`` or a newer one is there to stay, False after ``timeout_s``."""
        async with self._newer:
            try:
                await asyncio.wait_for(self._newer.wait_for(lambda: self._owned >= version), timeout_s)
            except TimeoutError:
                return False
        return True

    async def newest_version(self) -> tuple[int, str]:
        """Number and fingerprint of the newest weights."""
        version = max(self._objects)
        return version, self._sha256[version]


def publish(store: Any, version: int, weights: WeightArrays, sha256: str, timeout_s: float = 60.0) -> None:
    """Give a `WeightStore` new weights; returns when it owns them, so that they outlive this process.

    Raises:
        GetTimeoutError: when it has not taken them after ``timeout_s``.
    """
    ray.get(store.publish.remote(version, [ray.put(weights)], sha256), timeout=timeout_s)


class PolicyCopy:
    """An inference-only copy of a policy that follows a weight store; on a CPU it is the node's shared object itself,
    unless it is compiled.

    Args:
        store: name of the `WeightStore`. A handle could be gone when Ray starts the actor that has this copy again.
        description: of the policy, see `build_policy`.
        device: where it acts.
        timeout_s: longest wait for weights.
        compiled: fuse the Euler step, once: newer weights are then copied into the policy that is there.
    """

    def __init__(
        self, store: str, description: dict[str, Any], device: torch.device, timeout_s: float, compiled: bool = False
    ) -> None:
        self._store = ray.get_actor(store)
        self._description = description
        self._device = device
        self._timeout_s = timeout_s
        self._compiled = compiled
        self._policy: Policy | None = None
        self.version = -1

    def pull(self) -> Policy:
        """The policy, with newer weights if there are any."""
        newest = self._newest()
        if newest is not None:
            version, weights = newest
            if self._policy is not None and self._compiled:
                self.version = -1
                self._policy.load_state_dict(from_published(weights))
            else:
                self._policy, self.version = None, -1  # a GPU need not have room for both
                share = not self._compiled or self._device.type != "cpu"  # what is shared cannot be copied into
                policy = build_policy(self._description, from_published(weights), share).to(self._device)
                self._policy = policy.requires_grad_(False)
                if self._compiled:
                    self._policy.compile_step()
            self.version = version
        if self._policy is None:
            raise RuntimeError("no weights were published before the first episode")
        return self._policy

    def _newest(self) -> tuple[int, WeightArrays] | None:
        deadline = time.monotonic() + self._timeout_s
        while (found := ray.get(self._store.newer_than.remote(self.version), timeout=self._timeout_s)) is not None:
            version, (reference,) = found
            try:
                return version, ray.get(reference, timeout=self._timeout_s)
            except ray.exceptions.ObjectLostError:
                if time.monotonic() > deadline:
                    raise
                log.warning("weights %d were lost with the learner that lent them; the store has its own soon", version)
                time.sleep(0.5)
        return None
