"""Columns, images and films of LeRobot datasets as arrays."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ript_ray.data.lerobot.layout import COPY_AGAIN, readable
from ript_ray.errors import UserError

_PANDAS = "__index_level_"
"""Begins the name of an index that pandas kept."""


class Rows:
    """Rows of a data file; beyond those asked for, one row group is kept in memory.

    Args:
        path: of the parquet file. Checksums of its pages are verified where it has them.
        columns: what is read of it.
        listed: all that it may have; a column beyond these was renamed on one side, and would be left out in silence.
    """

    def __init__(self, path: Path, columns: Collection[str], listed: Collection[str]) -> None:
        self.path = path
        self._columns = list(columns)
        with readable(path):
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            about = self._file.metadata
            self._ends = np.cumsum([about.row_group(i).num_rows for i in range(about.num_row_groups)], dtype=np.int64)
            names = self._file.schema_arrow.names
        missing = [name for name in self._columns if names.count(name) != 1]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}, which meta/info.json lists; {COPY_AGAIN}")
        for name in sorted(set(names) - set(listed)):
            if name.startswith(_PANDAS):
                continue
            raise UserError(f"{path} has a column {name!r}, which meta/info.json does not list; {COPY_AGAIN}")
        self._kept: tuple[int, pa.Table] | None = None

    def read(self, first: int, length: int) -> pa.Table:
        """``length`` rows from ``first`` on."""
        stop = first + length
        rows = int(self._ends[-1]) if len(self._ends) else 0
        if stop > rows:
            raise UserError(f"{self.path} has {rows} rows, but an episode there ends at row {stop}; {COPY_AGAIN}")
        first_group = int(np.searchsorted(self._ends, first, side="right"))
        last_group = int(np.searchsorted(self._ends, stop, side="left"))
        before = int(self._ends[first_group - 1]) if first_group else 0
        groups = [self._group(i) for i in range(first_group, last_group + 1)]
        return pa.concat_tables(groups).slice(first - before, length)

    def _group(self, i: int) -> pa.Table:
        if self._kept is None or self._kept[0] != i:
            with readable(self.path):
                table = self._file.read_row_group(i, columns=self._columns)
                table.validate(full=True)
                # Otherwise a column whose length in the file's description is wrong would go unnoticed.
                if table.num_rows != self._file.metadata.row_group(i).num_rows:
                    raise ValueError(f"row group {i} has {table.num_rows} rows, not as many as its description says")
            self._kept = i, table
        return self._kept[1]


class Film:
    """Frames of a video, decoded once and in order, since seeking is not exact with every codec."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        """Index of the frame that is decoded next."""
        # As many frames as were recorded: none doubled or dropped for an even rate.
        self._frames: Any = iio.imiter(path, plugin="FFMPEG", output_params=["-fps_mode", "passthrough"])

    def frame(self, index: int) -> np.ndarray:
        """The frame of an index that is not before the position: uint8[H, W, 3]."""
        with readable(self.path):
            for frame in self._frames:
                self.position += 1
                if self.position == index + 1:
                    return np.asarray(frame)
        raise UserError(f"{self.path} has {self.position} frames, but an episode needs frame {index}; {COPY_AGAIN}")

    def close(self) -> None:
        """End the decoder's process."""
        self._frames.close()


def decode_vectors(table: pa.Table, name: str, width: int, where: str) -> np.ndarray:
    """A column of vectors: float32[L, width].

    Raises:
        UserError: when it is something else, has another width, gaps, or numbers that are not finite.
    """
    column = table.column(name).combine_chunks()
    flat = column
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        flat = column.flatten() if set(np.diff(column.offsets.to_numpy())) == {width} else None
    elif pa.types.is_fixed_size_list(column.type):
        flat = column.flatten() if column.type.list_size == width else None
    elif width != 1:
        flat = None
    if flat is None or column.null_count or flat.null_count or not _is_number(flat.type):
        raise UserError(
            f"{where}: {name!r} is {column.type} with {column.null_count} empty rows, but meta/info.json says {width} "
            f"numbers in each row; {COPY_AGAIN}"
        )
    with np.errstate(over="ignore"):
        values = np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(column), width)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        step, i = wrong[0]
        raise UserError(
            f"{where}: {name}[{i}] at step {step} is {flat[int(step) * width + int(i)]}, expected a finite float32; "
            f"leave the episode out: data.leave_out"
        )
    return values


def decode_integers(table: pa.Table, name: str, where: str) -> np.ndarray:
    """A column of whole numbers: int64[L]."""
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise UserError(f"{where}: {name!r} is {column.type}, expected a whole number in each row; {COPY_AGAIN}")
    return np.asarray(column.to_numpy())


def decode_image(cell: Any, where: str) -> np.ndarray:
    """A cell of a column of images: uint8[H, W, 3]."""
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if not isinstance(data, bytes):
        raise UserError(f"{where} holds no bytes of an image; store images in the dataset's tables, not as paths")
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except Exception as error:  # on damaged bytes decoders raise anything, from SyntaxError to struct.error
        raise UserError(f"{where} is no image that can be decoded ({error!r}); {COPY_AGAIN}") from error


def fit(frame: np.ndarray, size: int) -> np.ndarray:
    """Scale a frame into a square, bilinearly, with black bars on two sides as openpi does: uint8[size, size, 3]."""
    height, width = frame.shape[:2]
    ratio = max(height, width) / size
    inner = max(1, int(width / ratio)), max(1, int(height / ratio))
    canvas = Image.new("RGB", (size, size))
    scaled = Image.fromarray(frame).resize(inner, Image.Resampling.BILINEAR)
    canvas.paste(scaled, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return np.asarray(canvas)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))
