"""Where the episodes of a LeRobot dataset are, and what was to be done in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ript_ray.data.lerobot.layout import COPY_AGAIN, DatasetInfo, entry, load_json_lines, readable
from ript_ray.errors import UserError


@dataclass(frozen=True, slots=True)
class Place:
    """Where an episode is."""

    episode: int
    length: int
    tasks: tuple[str, ...]
    """What was to be done in it; empty where the list of episodes does not say."""
    data: Path
    first_row: int
    """In its data file."""
    films: dict[str, tuple[Path, int]]
    """By camera, its film and its first frame there."""


def find_episodes(info: DatasetInfo, films: list[str]) -> list[Place]:
    """The places of all episodes in order, with those of the films of these cameras."""
    places = _places_v3(info, films) if info.version == "v3.0" else _places_v2(info, films)
    if [place.episode for place in places] != list(range(info.episodes)):
        raise UserError(
            f"{info.root}: meta/info.json says {info.episodes} episodes, the list of episodes has {len(places)}, or "
            f"not in order; {COPY_AGAIN}"
        )
    frames = sum(place.length for place in places)
    if frames != info.frames:
        raise UserError(
            f"{info.root}: meta/info.json says {info.frames} frames, the list of episodes {frames}; {COPY_AGAIN}"
        )
    return places


def _places_v2(info: DatasetInfo, films: list[str]) -> list[Place]:
    path = info.root / "meta/episodes.jsonl"
    places = []
    for record in load_json_lines(path):
        episode, length, tasks = _outline(record, path)
        numbers = {"episode_index": episode, "episode_chunk": episode // info.chunks_size}
        paths = {film: (_path(info, info.video_path, video_key=film, **numbers), 0) for film in films}
        places.append(Place(episode, length, tasks, _path(info, info.data_path, **numbers), 0, paths))
    return places


def _places_v3(info: DatasetInfo, films: list[str]) -> list[Place]:
    """Episodes follow each other through all data files. What the list says of their files and rows is only asked where
    a file is missing or damaged: until 2026-02 LeRobot's own converter named the file before for the first episode of
    a file, and once counted rows anew in each file.
    """
    places: list[Place] = []
    files, ends = _data_files(info)
    row = 0
    starts: dict[Path, int] = {}
    for path, record in _episode_records(info, films):
        episode, length, tasks = _outline(record, path)
        if files:
            file = int(np.searchsorted(ends, min(row, info.frames - 1), side="right"))
            data, first_row = files[file], row - (int(ends[file - 1]) if file else 0)
        else:
            data = _path(info, info.data_path, **_numbers(record, "data", path))
            listed = entry(record, "dataset_from_index", int, path)
            first_row = listed - starts.setdefault(data, listed)  # the first episode of a file starts with the file
            if first_row < 0:
                raise UserError(
                    f"{path}: dataset_from_index of episode {episode} is {listed}, before its file; {COPY_AGAIN}"
                )
        row += length
        paths = {}
        for film in films:
            prefix = f"videos/{film}"
            start = round(entry(record, f"{prefix}/from_timestamp", float, path) * info.fps)
            paths[film] = _path(info, info.video_path, video_key=film, **_numbers(record, prefix, path)), start
        places.append(Place(episode, length, tasks, data, first_row, paths))
    return places


def _data_files(info: DatasetInfo) -> tuple[list[Path], np.ndarray]:
    """All data files in order, and the number of rows up to the end of each; none if they are not whole."""
    _path(info, info.data_path, chunk_index=0, file_index=0)  # a pattern that leads elsewhere is refused
    found = info.root.glob(re.sub(r"\{[^}]*\}", "*", str(info.data_path)))
    files = sorted(found, key=lambda file: [int(n) for n in re.findall(r"\d+", str(file.relative_to(info.root)))])
    try:
        rows = [pq.ParquetFile(file).metadata.num_rows for file in files]
    except (OSError, pa.ArrowException):  # told when its turn comes: its episodes may be left out
        return [], np.zeros(0)
    ends = np.cumsum(rows)
    return (files, ends) if sum(rows) == info.frames else ([], ends)


def _episode_records(info: DatasetInfo, films: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    columns = ["episode_index", "length", "tasks", "dataset_from_index", "data/chunk_index", "data/file_index"]
    for film in films:
        columns += [f"videos/{film}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    paths = sorted((info.root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{info.root}/meta/episodes has no parquet file; {COPY_AGAIN}")
    for path in paths:
        with readable(path):
            records = pq.ParquetFile(path, page_checksum_verification=True).read(columns=columns).to_pylist()
        yield from ((path, record) for record in records)


def _outline(record: Any, path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Index, length and tasks of an episode."""
    length = entry(record, "length", int, path)
    if length < 1:
        raise UserError(f"{path}: an episode's length is {length}, expected 1 or more; {COPY_AGAIN}")
    tasks = [] if record.get("tasks") is None else entry(record, "tasks", list, path)
    return entry(record, "episode_index", int, path), length, tuple(map(str, tasks))


def _numbers(record: Any, prefix: str, path: Path) -> dict[str, int]:
    numbers = {}
    for name in ("chunk_index", "file_index"):
        value = entry(record, f"{prefix}/{name}", (int, float), path)  # pandas makes floats of integers with gaps
        if value % 1 != 0:
            raise UserError(f"{path}: '{prefix}/{name}' is {value}, expected an integer; {COPY_AGAIN}")
        numbers[name] = int(value)
    return numbers


def _path(info: DatasetInfo, pattern: str | None, **values: object) -> Path:
    """The path that a pattern of meta/info.json gives, which must lie in the dataset."""
    about = f"{info.root}/meta/info.json: "
    if pattern is None:
        raise UserError(f"{about}video_path is null, though {values.get('video_key')!r} is a video; {COPY_AGAIN}")
    try:
        path = Path(pattern.format(**values))
    except (LookupError, ValueError, AttributeError, TypeError, ArithmeticError, MemoryError) as error:
        raise UserError(f"{about}the pattern {pattern!r} does not fit {values} ({error!r}); {COPY_AGAIN}") from error
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{about}the pattern {pattern!r} leads out of the dataset; use paths within it")
    return info.root / path


def load_instructions(info: DatasetInfo) -> dict[int, str]:
    """What to do, by task_index."""
    if info.version == "v3.0":
        path = info.root / "meta/tasks.parquet"
        with readable(path):
            table = pq.ParquetFile(path, page_checksum_verification=True).read()
            # The task is pandas' index, whose name differs between versions of LeRobot.
            texts = [field.name for field in table.schema if field.type in (pa.string(), pa.large_string())]
            records = [row | {"task": row[texts[0]]} for row in table.to_pylist()]
    else:
        path = info.root / "meta/tasks.jsonl"
        records = load_json_lines(path)
    return {entry(r, "task_index", int, path): entry(r, "task", str, path) for r in records}
