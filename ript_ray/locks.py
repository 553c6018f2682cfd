"""Files that one process at a time may hold."""

from __future__ import annotations

import fcntl
import time
from typing import TextIO

_POLL_S = 0.2


def take_lock(file: TextIO, timeout_s: float) -> bool:
    """Hold an open file until it is closed; False when another process still holds it after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(_POLL_S)
