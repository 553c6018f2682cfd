"""Policies on disk: ``model.safetensors`` and ``policy.json`` (sizes, transform) in one folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ript_ray.errors import UserError
from ript_ray.plugins import find_named
from ript_ray.policies.flow import FlowPolicy
from ript_ray.policies.int8 import FACTOR, roundable, rounded, take_int8
from ript_ray.policies.policy import Policy

Weights = dict[str, torch.Tensor]


def save_policy(folder: Path, policy: Policy, about: Mapping[str, object] | None = None) -> None:
    """Write a policy; the folder appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.partial")
    staging.mkdir(exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    save_file(weights, staging / "model.safetensors")
    description = {**policy.describe(), "about": dict(about or {})}
    description["sha256"] = _fingerprint(description, weights)
    (staging / "policy.json").write_text(json.dumps(description, indent=2) + "\n")
    if folder.exists():
        for file in staging.iterdir():
            file.replace(folder / file.name)
        staging.rmdir()
    else:
        staging.rename(folder)


def copy_policy(source: Path, target: Path) -> None:
    """Copy the folder of a policy; it appears complete or not at all, in place of what was there."""
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)


def load_policy(folder: Path) -> Policy:
    """Read a policy in evaluation mode.

    Raises:
        UserError: when a file is missing or damaged (by its SHA-256, too), or a tensor missing, unknown or misshapen.
            Never random weights.
    """
    with _readable(folder):
        description = json.loads((folder / "policy.json").read_text())
        policy_class(description["type"])  # tells more than that the rest does not fit
        weights = load_file(folder / "model.safetensors")
        if description.get("sha256", "") != _fingerprint(description, weights):
            raise ValueError("its sha256 is not the one that was written")
        return build_policy(description, weights, share=True)


def load_shape(folder: Path) -> Policy:
    """A policy without its weights, on the device "meta": its sizes, and nothing that takes memory.

    Raises:
        UserError: as `load_policy`, as far as that can be told without the weights.
    """
    with _readable(folder):
        return empty_policy(json.loads((folder / "policy.json").read_text()))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Whatever is wrong with a checkpoint becomes an error that says so."""
    for name in ("policy.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"policy.checkpoint={str(folder)!r}: {name} not found there; expected a folder written by "
                f"'python launch.py sft', for example {_shipped_example()}"
            )
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"policy.checkpoint={str(folder)!r} cannot be read ({type(error).__name__}: {error}); a file is damaged or "
            "of another version: copy it again, or make a new one with 'python launch.py sft'"
        ) from error


UNAVERAGED = "unaveraged-{:04d}"
"""Folder beside an update's checkpoint, of the weights that training goes on from where they are not those that act."""


def newest_policy(folder: Path, at_most: int) -> tuple[int, Policy | None, list[str]]:
    """The newest whole checkpoint of a run.

    Args:
        folder: a run's ``checkpoints``, with folders named by update.
        at_most: updates whose rollouts the run knows; newer ones it would not make again as they were.

    Returns:
        Its update and the policy, or 0 and None when there is none; and what is wrong with newer ones.
    """
    damaged: list[str] = []
    found = [path for path in folder.glob("[0-9]*") if path.name.isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name), reverse=True):
        if int(path.name) > at_most:
            damaged.append(f"{path} is newer than the journal, which knows the rollouts of {at_most} updates")
            continue
        try:
            policy = load_policy(path)
            unaveraged = folder / UNAVERAGED.format(int(path.name))
            if unaveraged.exists():  # from which the next update goes on
                load_policy(unaveraged)
            return int(path.name), policy, damaged
        except UserError as error:
            damaged.append(str(error))
    return 0, None, damaged


def prune_checkpoints(folder: Path, keep: int, best: Sequence[int] = (), spared: int = 1) -> None:
    """Of a run's ``checkpoints`` leave only those of the newest ``keep`` updates, whatever they are of (``0007``,
    ``unaveraged-0007``), and of the first ``spared`` of ``best`` that are there.
    """
    updates = {path: int(number) for path in folder.iterdir() if (number := path.name.rpartition("-")[2]).isdecimal()}
    there = set(updates.values())
    kept = sorted(there)[-keep:] + [update for update in best if update in there][:spared]
    for path, update in updates.items():
        if update not in kept:
            shutil.rmtree(path, ignore_errors=True)  # what a busy disk keeps goes next time


def build_policy(description: Mapping[str, Any], weights: Weights, share: bool = False) -> Policy:
    """A policy in evaluation mode from its description (as in ``policy.json``) and weights.

    Args:
        description: from `Policy.describe`.
        weights: every tensor by name.
        share: use the tensors themselves as parameters instead of copying them.

    Raises:
        UserError: when a tensor is missing, unknown or misshapen.
    """
    policy = empty_policy(description)
    take_int8(policy, [name.removesuffix(".weight") for name, w in weights.items() if w.dtype == torch.int8])
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"policy weights do not fit: {name} should be {expected.get(name, 'absent')}, "
                f"the file has {found.get(name, 'nothing')}"
            )
    own = weights if share else {name: tensor.clone() for name, tensor in weights.items()}
    policy.load_state_dict(own, assign=True)
    return policy.eval()


def empty_policy(description: Mapping[str, Any]) -> Policy:
    """A policy without memory for its weights (on PyTorch's meta device), from its description.

    Somebody's own has memory: it may keep tensors that are no weights, and nobody would fill them.
    """
    kind = str(description["type"])
    with torch.device("cpu" if ":" in kind else "meta"):
        return policy_class(kind).from_description(description)


def policy_class(kind: str) -> type[Policy]:
    """The architecture of this name, or, as ``module:class``, somebody's own.

    It is imported when it is needed, since some take seconds to import.

    Raises:
        ValueError: when there is none of this name.
        UserError: when there is no such module or class.
    """
    if kind == "flow":
        return FlowPolicy
    if kind == "pi0":
        from ript_ray.policies.pi0.policy import Pi0Policy

        return Pi0Policy
    if ":" in kind:
        found: type[Policy] = find_named(kind, "type")
        return found
    raise ValueError(f"type {kind!r} is unknown; valid: 'flow', 'pi0', and module:class for one of yours")


def cpu_weights(policy: torch.nn.Module) -> Weights:
    """A detached copy of all weights and buffers on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in policy.state_dict().items()}


def weights_sha256(weights: Weights) -> str:
    """A fingerprint of names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # no copy: embeddings may have 2 GB
    return digest.hexdigest()


def _fingerprint(description: Mapping[str, Any], weights: Weights) -> str:
    """SHA-256 of all that a folder holds."""
    plain = {name: value for name, value in description.items() if name != "sha256"}
    content = json.dumps(plain, sort_keys=True) + weights_sha256(weights)
    return hashlib.sha256(content.encode()).hexdigest()


def _shipped_example() -> str:
    shipped = sorted(Path(__file__).resolve().parents[2].glob("checkpoints/*/policy.json"))
    return f"checkpoints/{shipped[0].parent.name}" if shipped else "one of your own"


def to_publish(policy: Policy, precision: str = "float32") -> tuple[dict[str, np.ndarray], str]:
    """A policy's weights as a weight store takes them, and the fingerprint of the policy.

    Args:
        policy: in training precision.
        precision: ``bfloat16`` halves what actors hold of a large policy; NumPy has no such numbers, so their bits
            travel as uint16. ``int8`` halves it again, but for embeddings and convolutions.
    """
    weights = cpu_weights(policy)
    sha256 = weights_sha256(weights)
    if precision == "int8":
        for name in roundable(policy):
            weights[f"{name}.weight"], weights[f"{name}.{FACTOR}"] = rounded(weights[f"{name}.weight"])
    if precision != "float32":
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not (policy.keeps_exact(name) or name.endswith(f".{FACTOR}")):
                weights[name] = tensor.bfloat16().view(torch.uint16)
    return {name: tensor.numpy() for name, tensor in weights.items()}, sha256


def published_bytes(policy: Policy, precision: str) -> float:
    """Bytes of what `to_publish` makes; the policy may be without memory for its weights."""
    eight = {f"{name}.weight" for name in roundable(policy)} if precision == "int8" else set()

    def size(name: str, tensor: torch.Tensor) -> int:
        if name in eight:
            return tensor.numel() + 4 * len(tensor)
        return tensor.numel() * (4 if precision == "float32" or policy.keeps_exact(name) else 2)

    return float(sum(size(name, tensor) for name, tensor in policy.state_dict().items()))


def from_published(arrays: Mapping[str, np.ndarray]) -> Weights:
    """The weights that `to_publish` made, without copying them; for inference only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: w.view(torch.bfloat16) if w.dtype == torch.uint16 else w for name, w in weights.items()}
