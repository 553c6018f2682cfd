"""The typed configuration: YAML files plus ``key=value`` overrides. Every key is checked before anything starts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from ript_ray.config import rules
from ript_ray.config.commands import BenchConfig, ConvertConfig, DemosConfig, PlanConfig, SftConfig, TuneConfig
from ript_ray.config.job import INIT_STATES, EnvConfig, EvalConfig, PolicyConfig, RunConfig, ScalingConfig
from ript_ray.config.learning import OBJECTIVE_NAMES, DataConfig, ObjectiveConfig, SamplingConfig, TrainConfig
from ript_ray.config.section import Section
from ript_ray.errors import UserError, nearest

__all__ = [
    "INIT_STATES",
    "LEARNING",
    "OBJECTIVE_NAMES",
    "BenchConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DemosConfig",
    "EnvConfig",
    "EvalConfig",
    "ObjectiveConfig",
    "PlanConfig",
    "PolicyConfig",
    "RunConfig",
    "SamplingConfig",
    "ScalingConfig",
    "SftConfig",
    "TrainConfig",
    "TuneConfig",
    "known_keys",
    "load_config",
    "resolve",
    "save_config",
]

LEARNING = ("env", "policy", "eval", "sampling", "data", "objective", "train")
"""Sections that, with ``run.seed``, decide what a run does; the others say where and how wide it runs, or are for other
commands."""


class Config(Section):
    """All settings of a job."""

    run: RunConfig = RunConfig()
    env: EnvConfig = EnvConfig()
    policy: PolicyConfig = PolicyConfig()
    eval: EvalConfig = EvalConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    demos: DemosConfig = DemosConfig()
    sft: SftConfig = SftConfig()
    convert: ConvertConfig = ConvertConfig()
    plan: PlanConfig = PlanConfig()
    tune: TuneConfig = TuneConfig()
    bench: BenchConfig = BenchConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        rules.check(self)
        return self


def load_config(file: Path | None, overrides: list[str]) -> Config:
    """Read a configuration file and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        UserError: for a missing file, an unknown key or a wrong value; the message names the key, the value, what was
            expected and the nearest valid key.
    """
    values: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            shipped = sorted(str(path) for path in file.parent.glob("*.yaml"))
            raise UserError(f"--config {file}: no such file; {nearest(str(file), shipped) if shipped else ''}")
        try:
            values = yaml.safe_load(file.read_text()) or {}
        except (yaml.YAMLError, ValueError) as error:  # what is no UTF-8 is a ValueError
            raise UserError(f"--config {file}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"--config {file}: expected sections such as 'train: {{updates: 3}}', found {values!r}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"{override!r}: expected section.key=value, for example run.seed=1")
        _set(values, key, text)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(detail) for detail in error.errors())) from error


def save_config(config: Config, file: Path) -> None:
    """Write the resolved configuration, in a form that `load_config` reads."""
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def resolve(path: str) -> Path:
    """A path as given, or, when it is not there, relative to the project: commands work from any folder."""
    given = Path(path)
    return given if given.exists() or given.is_absolute() else Path(__file__).parents[2] / given


def known_keys() -> list[str]:
    """All keys in dotted form."""
    return [f"{name}.{key}" for name, section in _sections().items() for key in section.model_fields]


def _sections() -> dict[str, type[BaseModel]]:
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def _set(values: dict[str, Any], key: str, text: str) -> None:
    section, _, name = key.partition(".")
    if key not in known_keys():
        raise UserError(f"unknown key {key!r}; {nearest(key, known_keys())}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text!r}: not a valid value: {error}") from error
    # YAML 1.1 reads 1e-4 as text, since it has no decimal point; people write it all the same.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(values.setdefault(section, {}), dict):
        raise UserError(f"{section}={values[section]!r}: expected keys and values, as {key} is one")
    values[section][name] = value


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int))
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(key, known_keys() if '.' in key else _sections())}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}={detail['input']!r}: {message[0].lower()}{message[1:]}" if key else message
