"""A process that watches another from outside: what hangs in C cannot rescue itself.

The watched process notes in shared memory what it does and until when it should be done; its watcher, a small child
process, kills it when that time is over or when it has grown too large, and leaves a line that says why.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_RECORD = struct.Struct("d d 24s")
"""Deadline on the monotonic clock (0: none), the limit in seconds, and the name of the operation."""
_POLL_S = 0.25


class Watchdog:
    """Watches the process that makes it.

    Args:
        last_words: file for the reason of an end; what is there from an earlier process is in `earlier`.
        memory_mb: largest size of memory that the process shares with no other.
    """

    def __init__(self, last_words: Path, memory_mb: float) -> None:
        self.earlier = last_words.read_text() if last_words.exists() else None
        """Why the process before this one ended, if it did not end by itself."""
        last_words.unlink(missing_ok=True)
        self._last_words = str(last_words)
        # The child inherits the open file, which has no name and vanishes with the two.
        with tempfile.TemporaryFile() as file:
            file.truncate(mmap.PAGESIZE)
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
            settings = [str(file.fileno()), str(os.getpid()), str(memory_mb), str(last_words)]
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *settings],
                pass_fds=[file.fileno()],
                start_new_session=True,  # else it could be taken down together with what it watches
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    @contextlib.contextmanager
    def guard(self, operation: str, limit_s: float) -> Iterator[None]:
        """End the process if what happens inside takes longer than ``limit_s``. Inner guards replace outer ones."""
        before = self._memory[: _RECORD.size]
        _RECORD.pack_into(self._memory, 0, time.monotonic() + limit_s, limit_s, operation.encode()[:24])
        try:
            yield
        finally:
            self._memory[: _RECORD.size] = before

    def end(self, reason: str) -> NoReturn:
        """End the process at once, and leave the reason."""
        _write(self._last_words, reason)
        os._exit(1)

    def close(self) -> None:
        """Stop watching."""
        self._child.terminate()
        self._child.wait(timeout=10)


def _watch(descriptor: int, process: int, memory_mb: float, last_words: str) -> None:
    memory = mmap.mmap(descriptor, mmap.PAGESIZE)
    while True:
        time.sleep(_POLL_S)
        deadline, limit, name = _RECORD.unpack_from(memory, 0)
        operation = name.rstrip(b"\0").decode()
        if os.getppid() != process:
            if deadline:
                _write(last_words, f"the process died in {operation!r}")
            return
        private = private_mb(process)
        if deadline and time.monotonic() > deadline:
            reason = f"{operation!r} took longer than {limit:g} s"
        elif private > memory_mb:
            reason = f"memory of {private:.0f} MB is more than the {memory_mb:.0f} MB allowed"
        else:
            continue
        _write(last_words, f"ended by its watchdog: {reason}")
        os.kill(process, signal.SIGKILL)
        return


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def private_mb(process: int) -> float:
    """Memory of a process that is neither shared nor backed by a file."""
    try:
        with open(f"/proc/{process}/statm") as file:
            resident, shared = (int(pages) for pages in file.read().split()[1:3])
    except (OSError, ValueError):  # no such file system, or the process is just ending
        return 0.0
    return (resident - shared) * mmap.PAGESIZE / 1e6


if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
