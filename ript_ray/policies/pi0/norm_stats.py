"""Normalisation statistics that lie beside a π0 checkpoint, all in openpi's form.

``{"state": {"mean": [...], "std": [...], "q01": [...] or None, "q99": ...}, "actions": {...}}``, one number for a
dimension. openpi keeps them in ``assets/<asset>/norm_stats.json``; LeRobot in the state files of its normalisers, and
before 0.4 among the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ript_ray.errors import UserError
from ript_ray.policies.pi0.weights import opened

NormStats = dict[str, dict[str, list[float] | None]]

_LEROBOT_FEATURES = {"state": "observation.state", "actions": "action"}
_PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
_NORMALIZERS = {"normalizer_processor": "STATE", "unnormalizer_processor": "ACTION"}
"""Steps of the processors with statistics, and what each of them prepares when the policy acts."""
_MODES = {"state": "STATE", "actions": "ACTION"}
"""LeRobot's types of features."""


def openpi_stats(assets: Path) -> dict[str, NormStats]:
    """Asset id, such as ``physical-intelligence/libero`` -> statistics; empty without a folder of assets.

    Raises:
        UserError: when a file is damaged.
    """
    files = sorted(assets.glob("**/norm_stats.json"))
    return {
        file.parent.relative_to(assets).as_posix(): parse_stats(read_json(file).get("norm_stats"), str(file))
        for file in files
    }


def lerobot_stats(folder: Path, buffers: Mapping[str, torch.Tensor]) -> dict[str, NormStats]:
    """LeRobot's statistics under the name ``lerobot``; empty where it has none.

    Args:
        folder: of the checkpoint, with the JSON files of its processors (LeRobot from 0.4 on).
        buffers: old LeRobot's, ``observation.state.mean`` and the like.

    Raises:
        UserError: when a file is damaged or missing.
    """
    flat = dict(buffers)
    for step in _steps(folder):
        if step.get("registry_name") in _NORMALIZERS and step.get("state_file"):
            with opened(folder / str(step["state_file"])) as tensors:
                flat |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118, no mapping
    groups: dict[str, Any] = {}
    for group, feature in _LEROBOT_FEATURES.items():
        found = {stat: flat.get(f"{feature}.{stat}") for stat in ("mean", "std", "q01", "q99")}
        # Buffers that were never filled hold infinity: LeRobot's mark, not statistics.
        if found["mean"] is not None and torch.isfinite(found["mean"]).all():
            groups[group] = {stat: None if v is None else v.flatten().tolist() for stat, v in found.items()}
    return {"lerobot": parse_stats(groups, str(folder))} if groups else {}


def lerobot_rules(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], bool]:
    """How LeRobot says that its policy's numbers are made: in its processors, or else in ``config.json``.

    Args:
        folder: of the checkpoint, with the JSON files of its processors (LeRobot from 0.4 on).
        config: its ``config.json``.

    Returns:
        ``state`` and ``actions`` -> ``MEAN_STD``, ``QUANTILES`` or another of LeRobot's names, as far as it says; and
        whether it says that actions are relative to the state.

    Raises:
        UserError: when a file is damaged.
    """
    modes = dict(_mapping(config.get("normalization_mapping")))
    relative = bool(config.get("use_relative_actions"))
    for step in _steps(folder):
        name, about = step.get("registry_name"), _mapping(step.get("config"))
        if name in _NORMALIZERS:
            found = _mapping(about.get("norm_map"))
            modes |= {kind: mode for kind, mode in found.items() if kind == _NORMALIZERS[name]}
        elif name == "relative_actions_processor":
            relative = relative or bool(about.get("enabled"))
    return {group: str(modes[kind]) for group, kind in _MODES.items() if kind in modes}, relative


def parse_stats(groups: object, where: str) -> NormStats:
    """Check statistics and bring them to one form: floats, and None for absent quantiles.

    Args:
        groups: what was read.
        where: for the error.

    Raises:
        UserError: when it is not of the form above, a number is not finite, or lengths differ within a group.
    """
    if not isinstance(groups, Mapping) or not groups:
        raise UserError(
            f"{where}: no statistics in it; expected openpi's {{'norm_stats': {{'state': …, 'actions': …}}}}"
        )
    return {str(group): _parse_group(stats, f"{where}: {group}") for group, stats in groups.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: when the file cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a JSON object: copy the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a {type(value).__name__}; expected a JSON object")
    return value


def _parse_group(stats: object, where: str) -> dict[str, list[float] | None]:
    if not isinstance(stats, Mapping):
        raise UserError(f"{where}: found a {type(stats).__name__}; expected mean, std, q01 and q99")
    parsed: dict[str, list[float] | None] = {}
    for stat in ("mean", "std", "q01", "q99"):
        values = stats.get(stat)
        if values is None and stat.startswith("q"):
            parsed[stat] = None
            continue
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{where}.{stat}: found {str(values)[:60]}; expected a list of numbers")
        if not all(math.isfinite(value) for value in values):
            raise UserError(f"{where}.{stat}: found a number that is not finite; expected the statistics of real data")
        parsed[stat] = [float(value) for value in values]
    lengths = {stat: len(values) for stat, values in parsed.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{where}: found lengths {lengths}; expected the same for all")
    return parsed


def _steps(folder: Path) -> list[dict[str, Any]]:
    """All steps of LeRobot's processors, those before the policy first; empty where it has none."""
    found: list[dict[str, Any]] = []
    for processor in (folder / name for name in _PROCESSORS):
        steps = read_json(processor).get("steps", []) if processor.is_file() else []
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise UserError(
                f"{processor}: 'steps' is no list of objects; expected what LeRobot writes: copy the file again"
            )
        found += steps
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
