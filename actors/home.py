"""Where the files of a run are: in its directory on the driver's node, whether or not other nodes share that disk."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ript_ray.policies.checkpoints import prune_checkpoints

_BLOCK = 1 << 26
"""Bytes that travel at a time."""


@dataclass(frozen=True, slots=True)
class Home:
    """A run's directory on the node that its driver and its coordinator are on.

    Processes on other nodes reach it through a folder of their own, and Ray. Where the disk is shared, nothing travels.
    """

    run_dir: Path
    node: str
    """Ray's identifier."""
    timeout_s: float
    """Longest wait for one block of a file."""

    @classmethod
    def here(cls, run_dir: Path, timeout_s: float) -> Self:
        """The directory as this node sees it. It is marked: another node that sees the mark shares the disk."""
        home = cls(run_dir.resolve(), ray.get_runtime_context().get_node_id(), timeout_s)
        home.run_dir.mkdir(parents=True, exist_ok=True)
        for mark in home.run_dir.glob(".home-*"):  # of earlier sessions
            if mark.name != home._mark.name:
                mark.unlink(missing_ok=True)
        home._mark.touch()
        return home

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Where to write a file or a folder; when the block ends it is at ``path``, complete or not at all.

        Raises:
            OSError: when a disk does not take it.
            GetTimeoutError: when a block takes longer than ``timeout_s``.
        """
        if self._is_shared():
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="ript_ray-") as folder:
            local, staged = Path(folder) / path.name, path.with_name(f".{path.name}.carried")
            yield local
            for file in _files(local):
                for start in range(0, max(1, file.stat().st_size), _BLOCK):
                    self._do(_write, staged / file.relative_to(local), start, _block(file, start))
            self._do(_settle, staged, path)

    @contextlib.contextmanager
    def reading(self, folder: Path) -> Iterator[Path]:
        """Where to read what is in a folder, which may not exist.

        Raises:
            GetTimeoutError: when a block takes longer than ``timeout_s``.
        """
        if self._is_shared():
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="ript_ray-") as place:
            local = Path(place) / folder.name
            for name, size in self._do(_sizes, folder):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                with (local / name).open("wb") as out:
                    for start in range(0, size, _BLOCK):
                        out.write(self._do(_read, folder / name, start))
            yield local

    def prune(self, checkpoints: Path, keep: int, best: Sequence[int] = (), spared: int = 1) -> None:
        """Leave only the newest of a run's checkpoints and the best, see `prune_checkpoints`.

        Raises:
            GetTimeoutError: when it takes longer than ``timeout_s``.
        """
        if self._is_shared():
            prune_checkpoints(checkpoints, keep, best, spared)
        else:
            self._do(_prune, checkpoints, keep, best, spared)

    @property
    def _mark(self) -> Path:
        return self.run_dir / f".home-{self.node}"

    def _is_shared(self) -> bool:
        return ray.get_runtime_context().get_node_id() == self.node or self._mark.exists()

    def _do(self, task: Any, *args: Any) -> Any:
        there = NodeAffinitySchedulingStrategy(self.node, soft=False)
        return ray.get(task.options(scheduling_strategy=there).remote(*args), timeout=self.timeout_s)


@ray.remote(num_cpus=0)
def _write(file: Path, start: int, block: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("r+b" if start else "wb") as out:
        out.seek(start)
        out.write(block)


@ray.remote(num_cpus=0)
def _settle(staged: Path, path: Path) -> None:
    if staged.exists():  # else it is done, and only the answer was lost
        if path.is_dir():
            shutil.rmtree(path)
        staged.replace(path)


@ray.remote(num_cpus=0)
def _prune(checkpoints: Path, keep: int, best: Sequence[int], spared: int) -> None:
    prune_checkpoints(checkpoints, keep, best, spared)


@ray.remote(num_cpus=0)
def _sizes(folder: Path) -> list[tuple[Path, int]]:
    return [(file.relative_to(folder), file.stat().st_size) for file in _files(folder)]


@ray.remote(num_cpus=0)
def _read(file: Path, start: int) -> bytes:
    return _block(file, start)


def _block(file: Path, start: int) -> bytes:
    with file.open("rb") as source:
        source.seek(start)
        return source.read(_BLOCK)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
