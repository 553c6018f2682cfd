"""A second place for a run's files, by path or URL: when the machine is gone, the run goes on from there on another."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from ript_ray.data.lines import read_json_lines
from ript_ray.errors import UserError
from ript_ray.reporting import write_text

log = logging.getLogger("ript_ray")

_JOURNAL = "journal.jsonl"
_ROWS = "metrics.jsonl"
_NOT_KEPT = ("learners", "mlflow-artifacts")
"""Folders that a run does not go on from."""
_LAST = "policy.json"
"""A checkpoint that has it is whole: files are copied in the order of their names."""
_CLOSE_TIMEOUT_S = 600.0
_WHOLE = ("s3", "gcs", "abfs")
"""Object stores: what is written appears whole or not at all, and cannot be renamed, only copied (S3: up to 5 GB)."""
_BLOCK = 1 << 24


class Storage:
    """Copies what is new in a run directory, in a thread of its own, whenever there is a new row of metrics.

    The journal comes last, as it was before anything else was copied, so it never speaks of a file that is not there.
    Every file appears complete or not at all. Then older checkpoints go, if newer ones are here.

    Args:
        url: what `pyarrow.fs.FileSystem.from_uri` takes (``s3://``, ``gs://``, ``hdfs://``, ``file://``), or a path.
        run_dir: is copied.
        keep_checkpoints: so many there, all by default.

    Raises:
        UserError: when nothing can be written there, or another run's files are there, or this run's when it was
            further.
    """

    def __init__(self, url: str, run_dir: Path, keep_checkpoints: int | None = None) -> None:
        self._url, self._run_dir, self._keep = url, run_dir, keep_checkpoints
        self._known: dict[Path, tuple[int, int]] = {}
        self._fs, self._root = _open(url)
        with _explained(url):
            there = _journal(self._fs, self._root)
        here = (run_dir / _JOURNAL).read_bytes() if (run_dir / _JOURNAL).exists() else b""
        if there and there.partition(b"\n")[0] != here.partition(b"\n")[0]:  # which tells when a run began
            raise UserError(
                f"run.storage={url!r} holds another run than {run_dir}; give a new run another place, or go on with "
                "that one: run.resume=true with a run.dir that is not there yet"
            )
        if not here.startswith(there):
            raise UserError(
                f"run.storage={url!r} is further than {run_dir}: the run went on elsewhere; to go on from there, move "
                f"{run_dir} away and send the same command again"
            )
        with _explained(url):
            self._fs.create_dir(str(self._root), recursive=True)
            self._copy(run_dir / "config.yaml")
            self._known |= dict(self._there())
        self._due, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="storage", daemon=True)
        self._thread.start()

    def __call__(self, row: dict[str, Any]) -> None:
        """There is something new."""
        self._due.set()

    def close(self) -> None:
        """Copy what is left. A failure is told, and leaves the run as it is."""
        self._ended.set()
        self._due.set()
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            print(f"run.storage={self._url!r} takes too long; {self._run_dir} is complete", file=sys.stderr)

    def _loop(self) -> None:
        last = False
        while not last:
            self._due.wait()
            self._due.clear()
            last = self._ended.is_set()
            try:
                self._save()
            except (OSError, ArrowException) as error:
                log.exception("run.storage did not take the files of %s", self._run_dir)
                if last:
                    print(f"run.storage={self._url!r}: {error}; {self._run_dir} is complete", file=sys.stderr)

    def _save(self) -> None:
        # A checkpoint comes after its row, a row after what the journal has of it, and an entry after its episode. So
        # what is read first speaks of nothing that is not copied with it.
        learnt = set(_files_in(self._run_dir / "checkpoints"))
        lines = {name: _whole_lines(self._run_dir / name) for name in (_ROWS, _JOURNAL)}
        # What an average was made of comes before it: the run goes on from both.
        for file in sorted(_files_in(self._run_dir), key=lambda file: ("unaveraged" not in str(file), file)):
            inside = file.relative_to(self._run_dir).parts
            if inside[0] in {*_NOT_KEPT, *lines} or any(part.startswith(".") for part in inside):
                continue
            if inside[0] == "checkpoints" and file not in learnt:
                continue
            with contextlib.suppress(FileNotFoundError):  # moved or removed meanwhile
                if file.is_file() and self._known.get(file) != _stamp(file):
                    self._copy(file)
        for name, whole in lines.items():
            if whole:
                self._write(name, BytesIO(whole))
        if self._keep is not None:  # last: the journal knows the newest that are left
            self._prune(self._keep)

    def _prune(self, keep: int) -> None:
        """Of the checkpoints that are there leave the newest ``keep`` whole ones, what is newer than the last, and what
        the run itself has kept.
        """
        found = self._fs.get_file_info(FileSelector(str(self._root / "checkpoints"), True, True))
        files = [PurePosixPath(info.path) for info in found if info.type == FileType.File]
        whole = sorted({int(file.parent.name) for file in files if file.name == _LAST and file.parent.name.isdecimal()})
        for folder in {file.parent for file in files}:
            update = folder.name.rpartition("-")[2]
            here = (self._run_dir / "checkpoints" / folder.name).exists()
            if len(whole) >= keep and update.isdecimal() and int(update) < whole[-keep] and not here:
                self._fs.delete_dir(str(folder))

    def _there(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        """What an earlier session has copied, and nobody has changed since."""
        for info in self._fs.get_file_info(FileSelector(str(self._root), recursive=True)):
            file = self._run_dir / PurePosixPath(info.path).relative_to(self._root)
            if info.type == FileType.File and file.is_file():
                size, modified = _stamp(file)
                if info.size == size and info.mtime_ns >= modified:
                    yield file, (size, modified)

    def _copy(self, file: Path) -> None:
        stamp = _stamp(file)  # before it is read: should it change meanwhile, it is copied again
        with file.open("rb") as source:
            self._write(file.relative_to(self._run_dir).as_posix(), source)
        self._known[file] = stamp

    def _write(self, name: str, source: BinaryIO) -> None:
        target = self._root / name
        if self._fs.type_name in _WHOLE:
            with self._fs.open_output_stream(str(target)) as out:
                shutil.copyfileobj(source, out, _BLOCK)
            return
        partial = target.with_name(f".{target.name}.partial")
        self._fs.create_dir(str(target.parent), recursive=True)
        with self._fs.open_output_stream(str(partial)) as out:
            shutil.copyfileobj(source, out, _BLOCK)
        self._fs.move(str(partial), str(target))


@contextlib.contextmanager
def stored(url: str | None, run_dir: Path, keep_checkpoints: int | None = None) -> Iterator[list[Storage]]:
    """A `Storage` for the time of a run, in a list; none when there is no URL."""
    storage = [Storage(url, run_dir, keep_checkpoints)] if url else []
    try:
        yield storage
    finally:
        for one in storage:
            one.close()


def restore(url: str, run_dir: Path) -> bool:
    """Copy a run back into a directory that has none; False when there is none to copy.

    The journal comes last: once it is there, all is. One that was interrupted begins anew.

    Raises:
        UserError: when the place cannot be read.
    """
    fs, root = _open(url)
    with _explained(url):
        if not fs.get_file_info(str(root / _JOURNAL)).size:
            return False
        there = fs.get_file_info(FileSelector(str(root), recursive=True))
        for info in sorted(there, key=lambda info: info.base_name == _JOURNAL):
            inside = PurePosixPath(info.path).relative_to(root)
            if info.type != FileType.File or any(part.startswith(".") for part in inside.parts):
                continue
            target = run_dir / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            with fs.open_input_stream(info.path) as source, partial.open("wb") as out:
                shutil.copyfileobj(source, out, _BLOCK)
            partial.replace(target)
    _drop_early_rows(run_dir)
    return True


def _drop_early_rows(run_dir: Path) -> None:
    """Rows of updates whose rollouts the journal does not have: what they tell of is done again."""
    entries = read_json_lines(run_dir / _JOURNAL, containing='"collected"')
    collected = sum(entry["kind"] == "collected" for entry in entries)
    rows = read_json_lines(run_dir / _ROWS)
    kept = [row for row in rows if row["update"] <= collected]
    if len(kept) < len(rows):
        write_text(run_dir / _ROWS, "".join(json.dumps(row) + "\n" for row in kept))


def _journal(fs: FileSystem, root: PurePosixPath) -> bytes:
    """The journal that is there, if one is."""
    journal = str(root / _JOURNAL)
    if fs.get_file_info(journal).type != FileType.File:
        return b""
    with fs.open_input_stream(journal) as source:
        return bytes(source.read())


def _open(url: str) -> tuple[FileSystem, PurePosixPath]:
    with _explained(url):
        if "://" not in url:
            return LocalFileSystem(), PurePosixPath(Path(url).resolve())
        fs, path = FileSystem.from_uri(url)
        return fs, PurePosixPath(path)


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(
            f"run.storage={url!r}: {str(error).splitlines()[0]}; expected a folder that can be written: a path, or "
            "a URL such as s3://bucket/run, with the credentials that its service looks for"
        ) from error


def _files_in(folder: Path) -> list[Path]:
    """All below a folder, where others write: a folder that vanishes meanwhile has none."""
    return [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]


def _whole_lines(file: Path) -> bytes:
    text = file.read_bytes() if file.exists() else b""
    return text[: text.rfind(b"\n") + 1]


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
