"""Names of tensors: this project's against those of openpi's PyTorch checkpoints, one to one."""

from __future__ import annotations

_PALIGEMMA = "paligemma_with_expert.paligemma.model."
_PREFIXES = {
    "vision.": f"{_PALIGEMMA}vision_tower.vision_model.",
    "projector.": f"{_PALIGEMMA}multi_modal_projector.linear.",
    "words.": f"{_PALIGEMMA}language_model.embed_tokens.",
    "language.": f"{_PALIGEMMA}language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}
"""The rest is named alike. ``words.`` comes before ``language.``, whose prefix it shares."""


def to_openpi(name: str) -> str:
    """Openpi's name of one of our tensors."""
    for own, theirs in _PREFIXES.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name


def from_openpi(name: str) -> str:
    """Our name of one of openpi's tensors."""
    for own, theirs in _PREFIXES.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name
