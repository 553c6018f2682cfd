"""Files of JSON lines that a process may have died while writing."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ript_ray.errors import UserError


def append_json_line(file: Path, entry: dict[str, Any]) -> None:
    """Add a line, or nothing of it.

    Raises:
        OSError: when the disk does not take it.
    """
    with file.open("ab") as out:
        size = out.tell()
        try:
            out.write(json.dumps(entry).encode() + b"\n")
            out.flush()
        except OSError:
            with contextlib.suppress(OSError):  # what is still in the buffer is lost, as it should be
                out.close()
            os.truncate(file, size)
            raise


def read_json_lines(file: Path, repair: bool = False, containing: str = "") -> list[dict[str, Any]]:
    """The entry of every line; none when there is no file. A last line that was cut short does not count.

    Args:
        file: of lines.
        repair: remove what was cut short from the file, so that lines can be added.
        containing: only lines with this text in them; the others are not even parsed.

    Raises:
        UserError: when another line is damaged.
    """
    if not file.exists():
        return []
    wanted, entries = containing.encode(), []
    damage: ValueError | None = None
    number = whole = 0  # lines, and their bytes, before the damaged one
    with file.open("rb") as lines:
        for line in lines:
            if damage is not None:
                raise UserError(
                    f"{file}: line {number + 1} is damaged ({damage}); cut the file before it: what it told after that "
                    "is done again"
                ) from damage
            if not line.endswith(b"\n"):  # somebody may be writing it just now
                break
            try:
                if wanted in line:
                    entries.append(json.loads(line))
                number, whole = number + 1, whole + len(line)
            except ValueError as error:
                damage = error
    if repair and whole < file.stat().st_size:
        os.truncate(file, whole)
    return entries
