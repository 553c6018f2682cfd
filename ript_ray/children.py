"""Asking a child process what might hang or crash this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def ask_child(program: str, timeout_s: float, *arguments: str, variables: Mapping[str, str] | None = None) -> Any:
    """Run a Python program that can import this project, and return the JSON value of the last line it prints.

    Args:
        program: its text.
        timeout_s: longest time it may take.
        arguments: its ``sys.argv[1:]``.
        variables: environment variables besides this process's own.

    Raises:
        RuntimeError: when it takes too long, fails or says nothing; the message is the last line of its complaint.
    """
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | dict(variables or {})
    try:
        child = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no answer within {timeout_s:.0f} s") from error
    lines = child.stdout.strip().splitlines()
    if child.returncode != 0 or not lines:
        said = child.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"ended with code {child.returncode}")
    return json.loads(lines[-1])
