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
_NORMALIZERS = ("normalizer_processor", "unnormalizer_processor")


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
    for name in _PROCESSORS:
        if (folder / name).is_file():
            for file in _state_files(folder / name):
                with opened(file) as tensors:
                    flat |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118, no mapping
    groups: dict[str, Any] = {}
    for group, feature in _LEROBOT_FEATURES.items():
        found = {stat: flat.get(f"{feature}.{stat}") for stat in ("mean", "std", "q01", "q99")}
        # Buffers that were never filled hold infinity: LeRobot's mark, not statistics.
        if found["mean"] is not None and torch.isfinite(found["mean"]).all():
            groups[group] = {stat: None if v is None else v.flatten().tolist() for stat, v in found.items()}
    return {"lerobot": parse_stats(groups, str(folder))} if groups else {}


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


def _state_files(processor: Path) -> list[Path]:
    """The files with the state of a processor's normalisers."""
    steps = read_json(processor).get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(
            f"{processor}: 'steps' is no list of objects; expected what LeRobot writes: copy the file again"
        )
    files = [step.get("state_file") for step in steps if step.get("registry_name") in _NORMALIZERS]
    return [processor.parent / str(file) for file in files if file]
