"""Safetensors files of π0 models: where each tensor lies, under openpi's name for it.

Three layouts are known: openpi's own; LeRobot's, which puts ``model.`` before it; and the one before transformers 4.52,
without the level ``.model.`` inside PaliGemma. Only headers are read until a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ript_ray.errors import UserError

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
"""The same tensor as :data:`EMBEDDING`; openpi stores it once, under this name."""
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
LEFT_OUT = {
    EXPERT_HEAD: "the action expert predicts no words; openpi allocates this head and never uses it",
    "paligemma_with_expert.gemma_expert.model.embed_tokens.weight": "the action expert reads no words",
}
"""Tensors of known checkpoints that no computation depends on -> why."""
_OLD_LAYOUT = {
    "paligemma.language_model.lm_head.": "paligemma.lm_head.",
    "paligemma.language_model.model.": "paligemma.model.language_model.",
    "paligemma.multi_modal_projector.": "paligemma.model.multi_modal_projector.",
    "paligemma.vision_tower.": "paligemma.model.vision_tower.",
}
"""LeRobot up to 0.3.3 and conversions of that time (transformers before 4.52) -> today."""
_TOWER = "paligemma.model.vision_tower."
_BUFFERS = {
    "normalize_inputs.buffer_observation_state.": "observation.state.",
    "unnormalize_outputs.buffer_action.": "action.",
    "normalize_inputs.": "",
    "normalize_targets.": "",
    "unnormalize_outputs.": "",
}
"""Old LeRobot kept statistics among the weights: the prefix there -> the one in its later files, "" for unused ones."""
_ROWS = 8192
"""Rows of an embedding compared at once: 64 MB of float32 in the 2B model."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    stored: str
    shape: tuple[int, ...]


class SafetensorsTensors:
    """Tensors of safetensors files, under canonical names; each ``load`` maps its file anew and keeps nothing."""

    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)
        self.shapes = {name: entry.shape for name, entry in entries.items()}

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the checkpoint's own dtype.

        Raises:
            UserError: when its file is gone or damaged.
        """
        entry = self._entries[name]
        with opened(entry.file) as file:
            tensor: torch.Tensor = file.get_tensor(entry.stored)
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose errors are the user's."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected a whole safetensors file: copy it again"
        ) from error


def canonical_name(stored: str) -> str:
    """The name in openpi's PyTorch code of a tensor that LeRobot or transformers stored under another one."""
    name = stored.removeprefix("model.").removeprefix("paligemma_with_expert.")
    if not name.startswith(("paligemma.", "gemma_expert.")):
        return stored.removeprefix("model.")
    for old, new in _OLD_LAYOUT.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    if name.startswith(_TOWER) and not name.startswith(f"{_TOWER}vision_model."):  # flattened by transformers 5.11
        name = f"{_TOWER}vision_model.{name.removeprefix(_TOWER)}"
    return f"paligemma_with_expert.{name}"


def read_entries(files: Sequence[Path]) -> dict[str, Entry]:
    """Canonical name -> where the tensor lies, from the files' headers."""
    entries: dict[str, Entry] = {}
    for path in files:
        with opened(path) as file:
            for stored in file.keys():  # noqa: SIM118, a safetensors file is no mapping
                name = canonical_name(stored)
                if name in entries:
                    other = entries[name]
                    raise UserError(
                        f"{path}: {stored!r} and {other.stored!r} (in {other.file.name}) are the same tensor "
                        f"{name!r}; expected it once: remove one of the two"
                    )
                entries[name] = Entry(path, stored, tuple(file.get_slice(stored).get_shape()))
    return entries


def tie_embedding(entries: dict[str, Entry]) -> None:
    """Keep one of the embedding's two names."""
    head, embedding = entries.pop(LM_HEAD, None), entries.get(EMBEDDING)
    if head is None:
        return
    entries.setdefault(EMBEDDING, head)
    if embedding is not None and not _equal(head, embedding):
        raise UserError(
            f"{head.file}: {head.stored!r} {list(head.shape)} and {embedding.stored!r} {list(embedding.shape)} differ; "
            "expected one tensor under two names (π0 ties them), so it is unclear which one the model was trained with"
        )


def take_statistics(entries: dict[str, Entry]) -> dict[str, torch.Tensor]:
    """Take old LeRobot's statistics out of the weights, under the names of its later files."""
    buffers: dict[str, torch.Tensor] = {}
    for name in [name for name in entries if name.startswith(tuple(_BUFFERS))]:
        entry = entries.pop(name)
        prefix = next(prefix for prefix in _BUFFERS if name.startswith(prefix))
        if _BUFFERS[prefix]:
            with opened(entry.file) as file:
                buffers[_BUFFERS[prefix] + name.removeprefix(prefix)] = file.get_tensor(entry.stored)
    return buffers


def _equal(one: Entry, other: Entry) -> bool:
    """Whether two matrices are equal, in a bounded amount of memory."""
    if one.shape != other.shape:
        return False
    with opened(one.file) as first, opened(other.file) as second:
        left, right = first.get_slice(one.stored), second.get_slice(other.stored)
        return all(
            torch.equal(left[row : row + _ROWS].float(), right[row : row + _ROWS].float())
            for row in range(0, one.shape[0], _ROWS)
        )
