"""What README and docs name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from benchmarks import BENCHMARKS
from launch import COMMANDS, default_config
from ript_ray.config import Config, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_command_in_the_documentation_can_be_given() -> None:
    seen = set()
    for page in PAGES:
        for text in re.findall(r"python launch\.py ([^`\n]*)", page.read_text().replace("\\\n", " ")):
            command, *words = shlex.split(text, comments=True)
            seen.add(command)
            if command == "bench":
                named = {word for word in words if re.fullmatch(r"[a-z]+", word)}
                assert words[0] in named <= BENCHMARKS.keys(), (page.name, text)
            settings = [word.replace("=S", "=0") for word in words if re.match(r"\w+\.\w+=[^$]", word)]
            named = words[words.index("--config") + 1] if "--config" in words[:-1] else ""
            config = ROOT / named if named.startswith("configs/") else default_config(command, words)
            load_config(config, settings)
    assert seen == set(COMMANDS)


def test_every_setting_in_the_documentation_exists() -> None:
    settings = {f"{section}.{key}" for section, values in Config().model_dump().items() for key in values}
    sections = "|".join(Config.model_fields)
    for page in PAGES:
        named = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z]\w*)(?==)", page.read_text()))
        assert named <= settings, (page.name, named - settings)
