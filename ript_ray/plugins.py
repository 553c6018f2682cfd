"""What users bring along: names like ``module:name``."""

from __future__ import annotations

import importlib
from typing import Any

from ript_ray.errors import UserError


def find_named(name: str, key: str) -> Any:
    """What ``module:name`` stands for.

    Args:
        name: of something in a module that Python finds.
        key: the setting that says so, for the message.

    Raises:
        UserError: when there is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{key}={name!r}: {error}; expected module:name of a module that Python finds, for example on PYTHONPATH"
        ) from error
