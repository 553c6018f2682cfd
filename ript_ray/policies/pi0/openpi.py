"""π0 and π0.5 checkpoints of others: openpi's (JAX and PyTorch) and LeRobot's, behind one interface, tensor by tensor.

    open_checkpoint(path) ─▶ Checkpoint ── tensors.shapes: name -> shape, from headers alone
                                        ├─ tensors.load(name): that tensor, nothing else
                                        └─ config, assets: what lies beside the weights

All names are those of openpi's PyTorch checkpoints, whatever the folder holds. Nothing is ever unpickled. A tensor that
no table here knows keeps its name, so that a strict loader can complain about it; the few that are left out on purpose
are in :data:`LEFT_OUT`. Whether the model is π0 or π0.5 is read from its tensors, never from a path.

Sources: openpi's ``models_pytorch`` and ``training/checkpoints.py``; LeRobot's ``policies/pi0``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file

from ript_ray.errors import UserError
from ript_ray.policies.pi0.norm_stats import NormStats, lerobot_stats, openpi_stats, parse_stats, read_json
from ript_ray.policies.pi0.orbax import OrbaxTensors
from ript_ray.policies.pi0.weights import (
    EMBEDDING,
    EXPERT_HEAD,
    LEFT_OUT,
    LM_HEAD,
    SafetensorsTensors,
    read_entries,
    take_statistics,
    tie_embedding,
)

_PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.ckpt")


class Tensors(Protocol):
    """Tensors that stay on disk, so that a model of 3.3 B parameters never exists twice.

    ``for name in tensors.shapes: parameters[name].copy_(tensors.load(name))`` is the order that reads fastest.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name -> shape, known without reading values."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the checkpoint's own dtype."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a folder holds."""

    path: Path
    kind: Literal["openpi_jax", "openpi_pytorch", "lerobot"]
    pi05: bool
    tensors: Tensors
    config: dict[str, Any]
    """``config.json`` as found; empty where there is none (openpi keeps its configurations in code)."""
    assets: dict[str, NormStats]
    """Asset (robot or data set) -> statistics; LeRobot's only ones are called ``lerobot``."""

    @property
    def norm_stats(self) -> NormStats | None:
        """The statistics, None where the checkpoint has none.

        Raises:
            UserError: when it has several: base checkpoints carry those of many robots.
        """
        if len(self.assets) > 1:
            raise UserError(
                f"{self.path} holds normalisation statistics of {len(self.assets)} robots or data sets; expected the "
                f"choice of one: {', '.join(sorted(self.assets))}"
            )
        return next(iter(self.assets.values()), None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise a checkpoint by its files and read everything but the weights.

    Args:
        path: a step of openpi's JAX trainer or its ``params`` folder; or a folder with ``model.safetensors``, in one
            file or in shards with an index, of openpi's PyTorch trainer or of LeRobot (old or new).

    Raises:
        UserError: when no known format is there, only pickles are, a file is damaged, two tensors claim one name, the
            two copies of the word embedding differ, or the model is of another kind.
    """
    params = next((folder for folder in (path, path / "params") if (folder / "_METADATA").is_file()), None)
    home = path if params is None else params.parent
    config = read_json(home / "config.json") if (home / "config.json").is_file() else {}
    kind: Literal["openpi_jax", "openpi_pytorch", "lerobot"] = "openpi_jax"
    tensors: Tensors
    buffers: dict[str, torch.Tensor] = {}
    if params is not None:
        tensors = OrbaxTensors(params)
    else:
        entries = read_entries(_weight_files(path))
        renamed = any(name != entry.stored for name, entry in entries.items())
        kind = "lerobot" if renamed or "type" in config else "openpi_pytorch"
        buffers = take_statistics(entries)
        for name in LEFT_OUT:
            entries.pop(name, None)
        tie_embedding(entries)
        tensors = SafetensorsTensors(entries)
    if "action_in_proj.weight" not in tensors.shapes:
        shown = ", ".join(sorted(tensors.shapes)[:3])
        raise UserError(
            f"{path}: no tensor 'action_in_proj.weight' among {len(tensors.shapes)} ({shown}, …); expected a π0 or "
            "π0.5 checkpoint of openpi or LeRobot (π0-FAST has no flow to train)"
        )
    stats = openpi_stats(home / "assets") or lerobot_stats(home, buffers)
    pi05 = "time_mlp_in.weight" in tensors.shapes
    return Checkpoint(path=path, kind=kind, pi05=pi05, tensors=tensors, config=config, assets=stats)


def write_openpi(
    path: Path,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    norm_stats: NormStats | None,
    asset_id: str,
) -> None:
    """Write what openpi's PyTorch code loads strictly; the folder appears complete or not at all.

    The word embedding goes under the name that openpi keeps of the tied pair, and zeros stand for the expert's head,
    which openpi wants to see and never uses.

    Args:
        path: a folder that does not exist yet.
        tensors: canonical name -> tensor, on any device.
        config: for ``config.json``; openpi's has action_dim, action_horizon, paligemma_variant, action_expert_variant
            and precision.
        norm_stats: for ``assets/<asset_id>/norm_stats.json``.
        asset_id: openpi's name of the robot or data set, such as ``physical-intelligence/libero``.

    Raises:
        UserError: when something is at ``path`` already, or the asset's folder would lie outside of it.
    """
    if path.exists():
        raise UserError(f"{path} exists already; expected a new folder: choose another or remove it")
    if Path(asset_id).is_absolute() or ".." in Path(asset_id).parts or not Path(asset_id).parts:
        raise UserError(f"asset id {asset_id!r}: expected a relative path such as 'physical-intelligence/libero'")
    weights = {name: tensor.detach() for name, tensor in dict(tensors).items()}
    weights[LM_HEAD] = weights.pop(EMBEDDING)
    words, width = len(weights[LM_HEAD]), len(weights["action_in_proj.weight"])
    weights[EXPERT_HEAD] = torch.zeros(words, width, dtype=weights[LM_HEAD].dtype)
    staging = path.with_name(f".{path.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, staging / "model.safetensors", metadata={"format": "pt", EMBEDDING: LM_HEAD})
        (staging / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        if norm_stats is not None:
            (staging / "assets" / asset_id).mkdir(parents=True)
            document = {"norm_stats": parse_stats(norm_stats, "norm_stats")}
            (staging / "assets" / asset_id / "norm_stats.json").write_text(json.dumps(document, indent=2) + "\n")
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards of its index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        raise _nothing_readable(folder)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index}: no 'weight_map' of tensor names to file names; copy the file again")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, but {index.name} names it; copy all shards of the checkpoint")
    return files


def _nothing_readable(path: Path) -> UserError:
    expected = (
        "expected a folder with params/_METADATA (openpi, JAX), or with model.safetensors or "
        "model.safetensors.index.json (openpi's PyTorch code, LeRobot)"
    )
    if not path.exists():
        return UserError(f"{path} does not exist; {expected}")
    files = [path] if path.is_file() else sorted(file for pattern in _PICKLES for file in path.glob(pattern))
    pickles = [file.name for file in files if any(file.match(pattern) for pattern in _PICKLES)]
    if pickles:
        return UserError(
            f"{path}: {', '.join(pickles)} are pickles, which can run any code when loaded, so they are never opened; "
            f"{expected}: convert the weights to safetensors where you trust them"
        )
    return UserError(f"{path} is no checkpoint of a known format; {expected}")
