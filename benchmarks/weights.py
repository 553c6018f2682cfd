"""From the learner to the last actor: how long new weights are under way, against one copy of the same bytes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import ray
import torch

from actors.weights import PolicyCopy, WeightStore, publish
from benchmarks.learner import make_policy
from cluster.session import ResourcePlan, ray_session, spawn
from ript_ray.config import Config
from ript_ray.policies.checkpoints import to_publish
from ript_ray.policies.flow import FlowConfig

_REPEATS = 7
_SIZES = FlowConfig(width=2048, depth=12)
_TIMEOUT_S = 120.0


@ray.remote
class _Actor:
    """Has a policy copy, as a rollout actor between two episodes."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._store = ray.get_actor("WeightStore")
        self._copy = PolicyCopy("WeightStore", description, torch.device("cpu"), _TIMEOUT_S)

    def follow(self, version: int) -> float:
        """Wait for a version and take it; returns when it had it, on the clock that all processes share."""
        ray.get(self._store.wait_for.remote(version, _TIMEOUT_S), timeout=_TIMEOUT_S)
        while self._copy.version < version:
            self._copy.pull()
        return time.monotonic()


def measure(config: Config) -> dict[str, Any]:
    """Seconds from the call that publishes weights to the last of ``scaling.actors`` that acts with them."""
    policy = make_policy(config.env.image_size, _SIZES)
    arrays, sha256 = to_publish(policy)
    copies, applied = [], []
    with ray_session(config.scaling, ResourcePlan.of(config.scaling, learners=False)):
        store = spawn(WeightStore, name="WeightStore")
        publish(store, 0, arrays, sha256)
        actors = [
            _Actor.options(num_cpus=config.scaling.actor_cpus).remote(policy.describe())  # type: ignore[attr-defined]
            for _ in range(config.scaling.actors)
        ]
        ray.get([actor.follow.remote(0) for actor in actors], timeout=_TIMEOUT_S)
        for version in range(1, _REPEATS + 1):
            started = time.perf_counter()
            copied = {name: array.copy() for name, array in arrays.items()}
            copies.append(time.perf_counter() - started)
            del copied
            following = [actor.follow.remote(version) for actor in actors]
            started = time.monotonic()
            publish(store, version, arrays, sha256)
            applied.append(max(ray.get(following, timeout=_TIMEOUT_S)) - started)
    copy, last = statistics.median(copies), statistics.median(applied)
    return {
        "benchmark": "weights",
        "mb": sum(array.nbytes for array in arrays.values()) / 1e6,
        "actors": config.scaling.actors,
        "copy_s": copy,
        "publish_to_last_actor_s": last,
        "ratio": last / copy,
    }
