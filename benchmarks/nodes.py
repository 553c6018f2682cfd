"""A cluster of three nodes on this machine, each with processes of its own, of which two can be lost."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from ray.cluster_utils import Cluster

from ript_ray.config import Config

_STORE_BYTES = 100_000_000
_FILLER = f"""
import sys
import numpy as np
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = [ray.put(np.full({_STORE_BYTES // 10}, i, np.uint8)) for i in range(20)]
print("full", flush=True)
sys.stdin.read()
"""


class Nodes:
    """A head that runs nothing but drivers, a node of role ``rollout`` and one of role ``learner``, a CPU each."""

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": _STORE_BYTES}
        )
        self._nodes: dict[str, Any] = {}
        self._filler: subprocess.Popen[str] | None = None
        for role in ("rollout", "learner"):
            self.join(role)

    def placed(self, config: Config) -> Config:
        """The configuration of a job for this cluster."""
        update: dict[str, Any] = {"address": self._cluster.address}
        update |= {"actor_labels": {"role": "rollout"}, "learner_labels": {"role": "learner"}}
        return config.model_copy(update={"scaling": config.scaling.model_copy(update=update)})

    def join(self, role: str) -> None:
        """A node of this role joins."""
        self._nodes[role] = self._cluster.add_node(num_cpus=1, labels={"role": role}, object_store_memory=_STORE_BYTES)

    def leave(self, role: str) -> None:
        """All processes of the node of this role are killed, its raylet among them."""
        self._cluster.remove_node(self._nodes.pop(role), allow_graceful=False)

    def fill(self) -> None:
        """Somebody else holds twice as much in the head's object store as it can take, until `drain`."""
        self._filler = subprocess.Popen(
            [sys.executable, "-c", _FILLER, self._cluster.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._filler.stdout is not None
        if self._filler.stdout.readline() != "full\n":
            raise RuntimeError("the object store could not be filled")

    def drain(self) -> None:
        """Undo `fill`."""
        if self._filler is not None:
            self._filler.communicate(timeout=60)
            self._filler = None

    def close(self) -> None:
        """End all nodes."""
        self.drain()
        self._cluster.shutdown()
