"""The page of all settings, from their types: ``python -m ript_ray.reference`` writes ``docs/configuration.md``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from ript_ray.config import Config
from ript_ray.config.section import Section

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_HEAD = """# All settings

Every command takes `--config FILE` and `section.key=value`; files in `configs/` show the usual ones. An unknown key or
a wrong value is an error before anything starts. The column "default" holds for keys that neither names. A command
without `--config` reads `configs/default.yaml`, which changes some of them; another file replaces that one and does not
extend it. This page is made from `ript_ray/config/` by `python -m ript_ray.reference`.
"""


def configuration_page() -> str:
    """Sections with a table each: key, type and bounds, default, meaning."""
    parts = [_HEAD]
    for name, field in Config.model_fields.items():
        section: type[Section] = field.annotation  # type: ignore[assignment]
        lines = [f"## {name}", (section.__doc__ or "").strip(), ""]
        lines += ["| key | expected | default | meaning |", "|---|---|---|---|"]
        for key, setting in section.model_fields.items():
            meaning = re.sub(r"``([^`]*)``", r"`\1`", " ".join((setting.description or "").split()))
            cells = [f"`{name}.{key}`", _expected(setting), f"`{_plain(setting.default)}`", meaning]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _expected(setting: FieldInfo) -> str:
    bounds = []
    for limit in setting.metadata:
        for kind, sign, name in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
            if isinstance(limit, kind):
                bounds.append(f"{sign} {getattr(limit, name):g}")
    words = _type(setting.annotation)
    plain = words.removesuffix(" or null")
    return " ".join([plain, ", ".join(bounds)]) + (", or null" if plain != words else "") if bounds else words


def _type(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is None:
        return {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(a) for a in arguments)}]"
    if origin is dict:
        return f"mapping from name to {'value' if arguments[1] is Any else 'text'}"
    if all(isinstance(a, str) for a in arguments):
        return ", ".join(f"`{a}`" for a in arguments)
    return " or ".join(_type(a) for a in arguments)


def _plain(value: Any) -> str:
    """A default as YAML takes it."""
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(configuration_page())
