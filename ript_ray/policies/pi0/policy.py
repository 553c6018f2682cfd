"""π0 (arXiv 2410.24164) and π0.5 (arXiv 2504.16054): SigLIP and Gemma read images and words, an expert makes actions.

The mathematics are openpi's, the names of tensors those of its PyTorch checkpoints (`ript_ray.policies.pi0.layout`).
Three things are computed less often than in the reference, with the same result, since no token attends to a later
block: images and words once for an observation, π0's state token once for an observation and a condition, and of the
last layer for the images and words only its keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from ript_ray.policies.pi0.gemma import Cache, Gemma, GemmaSizes
from ript_ray.policies.pi0.prompt import PromptTokenizer, pad, prompt_tokens
from ript_ray.policies.pi0.transform import Pi0Transform
from ript_ray.policies.policy import Policy
from ript_ray.policies.stages import note

ADVANTAGES = ("negative", "positive")
"""What the prompt says of c = 0 and c = 1."""
_EXACT = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp", "time_mlp", "condition")
_PERIODS = (4e-3, 4.0)
"""Of the time embedding."""


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """Sizes of the SigLIP tower; the default is So400m/14."""

    width: int = 1152
    mlp: int = 4304
    layers: int = 27
    heads: int = 16
    patch: int = 14
    image_size: int = 224


@dataclass(frozen=True, slots=True)
class Pi0Config:
    """Sizes of `Pi0Policy`; the defaults are those of the published π0."""

    pi05: bool = False
    """π0.5: time modulates the expert's norms, and there is no state token."""
    horizon: int = 50
    action_dim: int = 32
    state_dim: int = 32
    vocabulary: int = 257_152
    max_tokens: int = 48
    """Of a prompt; 200 for π0.5."""
    state_in_prompt: bool = False
    """π0.5: the state is written into the prompt (openpi's ``discrete_state_input``)."""
    prompt_states: int | None = None
    """So many numbers of it, padded with zeros; the robot's own by default."""
    condition: Literal["none", "embedding", "text"] = "embedding"
    """How the model is told c: an embedding on π0's state token (π0.5: on its time), which is zero at first, or by
    ``Advantage: positive`` or ``negative`` in the prompt (RECAP, arXiv 2511.14759)."""
    vision: VisionSizes = field(default_factory=VisionSizes)
    language: GemmaSizes = field(default_factory=lambda: GemmaSizes(2048, 16384, 18, 8, 1, 256))
    expert: GemmaSizes = field(default_factory=lambda: GemmaSizes(1024, 4096, 18, 8, 1, 256))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Pi0Config:
        """The inverse of `dataclasses.asdict`."""
        parts = {"vision": VisionSizes, "language": GemmaSizes, "expert": GemmaSizes}
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in values.items()})


_TINY = Pi0Config(
    vocabulary=512,
    vision=VisionSizes(width=32, mlp=64, layers=2, heads=2, image_size=56),
    language=GemmaSizes(64, 128, 2, 4, 1, 16),
    expert=GemmaSizes(32, 64, 2, 4, 1, 16),
)
PRESETS = {
    "pi0": Pi0Config(),
    "pi05": Pi0Config(pi05=True, max_tokens=200, state_in_prompt=True),
    "pi0_tiny": _TINY,
    "pi05_tiny": replace(_TINY, pi05=True, max_tokens=200, state_in_prompt=True),
}
"""Sizes by name: the published ones, and some for tests and first steps on a CPU."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """B observations."""

    images: torch.Tensor
    """Embedded, float[B, tokens, width]."""
    state: torch.Tensor
    """Normalised and widened, float32[B, state_dim]."""
    instructions: list[str]
    prefix: Cache | None
    """Of images and words; None where the words depend on the condition."""


@dataclass(frozen=True, slots=True)
class _Told:
    """N observations at conditions."""

    cache: Cache
    """Of images, words and state."""
    offset: torch.Tensor | None
    """Of the condition, on π0.5's time: float32[N, width]."""


class Pi0Policy(Policy):
    """The velocity field of π0 or π0.5.

    Args:
        config: sizes.
        transform: statistics and image size.
        tokenizer: of its prompts.
    """

    kind = "pi0"
    transform: Pi0Transform

    def __init__(self, config: Pi0Config, transform: Pi0Transform, tokenizer: PromptTokenizer) -> None:
        super().__init__()
        self.config, self.transform, self.tokenizer = config, transform, tokenizer
        self.horizon, self.action_dim = config.horizon, config.action_dim
        self._longest = 0
        """Every prompt becomes as long, if that is more."""
        self._without_numbers = False
        self.vision = SiglipVisionModel(_siglip(config.vision))
        # No tensor of checkpoints, hence to be real even where the rest is still without memory.
        places = torch.arange((config.vision.image_size // config.vision.patch) ** 2, device="cpu")
        self.vision.embeddings.register_buffer("position_ids", places[None], persistent=False)
        self.projector = nn.Linear(config.vision.width, config.language.width)
        self.words = nn.Embedding(config.vocabulary, config.language.width)
        self.language = Gemma(config.language)
        self.expert = Gemma(config.expert, modulated=config.pi05)
        width = config.expert.width
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.state_dim, width)
            self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * width, width), nn.Linear(width, width)
        if config.condition == "embedding":
            self.condition = nn.Embedding(2, width)
            nn.init.zeros_(self.condition.weight)
        for name, parameter in self.named_parameters():
            if self.is_unused(name):
                parameter.requires_grad_(False)

    @property
    def conditional(self) -> bool:
        return self.config.condition != "none"

    def is_unused(self, name: str) -> bool:
        """Checkpoints hold this tensor, but nothing depends on it: what follows the last keys of images and words."""
        last = f"language.layers.{self.config.language.layers - 1}."
        needed = (f"{last}input_layernorm", f"{last}self_attn.k_proj", f"{last}self_attn.v_proj")
        return name.startswith(("language.norm", last)) and not name.startswith(needed)

    def encode(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> _Seen:
        pixels = note("pixels", self.transform.encode_images(frames))
        features = self.vision(pixels.flatten(0, 1).to(self.projector.weight.dtype)).last_hidden_state
        images = note("images", self.projector(features).view(len(pixels), -1, self.config.language.width))
        state = note("state", self.transform.encode_state(states))
        seen = _Seen(images, state, instructions, None)
        return seen if self.config.condition == "text" else replace(seen, prefix=self._prefix(seen, None))

    def conditioned(self, features: _Seen, condition: torch.Tensor) -> _Told:
        times = len(condition) // len(features.state)
        known = features.prefix
        cache = known.repeat(times) if known is not None else self._prefix(features, condition)
        offset = self.condition(condition) if self.config.condition == "embedding" else None
        if self.config.pi05:
            return _Told(cache, offset)
        with torch.autocast(condition.device.type, enabled=False):
            token = self.state_proj(features.state.repeat(times, 1))
            token = token if offset is None else token + offset
        own = self.expert.cache(token[:, None].to(cache.keys[0].dtype), None, cache)
        return _Told(cache.extended(own), None)

    def velocity(self, conditioned: _Told, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        modulation = None
        with torch.autocast(x.device.type, enabled=False):  # times and small projections stay in float32
            time = note("time embedding", time_embedding(t, self.config.expert.width))
            tokens = self.action_in_proj(x.float())
            if self.config.pi05:
                modulation = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))
                modulation = modulation if conditioned.offset is None else modulation + conditioned.offset
            else:
                both = torch.cat([tokens, time[:, None].expand_as(tokens)], 2)
                tokens = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
        hidden = self.expert(tokens.to(conditioned.cache.keys[0].dtype), conditioned.cache, modulation)
        with torch.autocast(x.device.type, enabled=False):
            return self.action_out_proj(hidden.float())

    def keeps_exact(self, name: str) -> bool:
        """Norms and the small projections of states, actions and times; openpi keeps them and two embeddings."""
        return name.startswith(_EXACT) or ("norm." in name and not name.startswith("vision."))

    def compile_step(self, mode: str = "default") -> None:
        self._longest = self.config.max_tokens  # another length would be another graph
        super().compile_step(mode)

    def without_numbers(self) -> None:
        self._without_numbers = True

    def checkpoint_activations(self) -> None:
        self.vision.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        self.language.checkpointing = self.expert.checkpointing = True

    def shardable(self) -> list[nn.Module]:
        return [*self.vision.encoder.layers, *self.language.layers, *self.expert.layers]

    def describe(self) -> dict[str, Any]:
        return description_of(self.config, self.transform, self.tokenizer)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(
            Pi0Config.from_json(description["config"]),
            Pi0Transform.from_json(description["transform"]),
            PromptTokenizer.from_json(description["tokenizer"]),
        )

    def _prompts(self, seen: _Seen, conditions: torch.Tensor | None) -> list[list[int]]:
        """Tokens of the B rows, or of the n·B rows of conditions."""
        rows = len(seen.state) if conditions is None else len(conditions)
        if self._without_numbers and (self.config.state_in_prompt or conditions is not None):
            return [[0] * self.config.max_tokens] * rows
        times = rows // len(seen.state)
        states: list[Any] = [None] * rows
        if self.config.state_in_prompt:
            count = self.config.prompt_states or len(self.transform.state_mean)
            own = seen.state[:, :count].float().cpu().numpy()
            states = list(own) * times
        advantages = [None] * rows if conditions is None else [ADVANTAGES[c] for c in conditions.tolist()]
        return [
            prompt_tokens(self.tokenizer, *prompt, self.config.max_tokens)
            for prompt in zip(seen.instructions * times, states, advantages, strict=True)
        ]

    def _prefix(self, seen: _Seen, conditions: torch.Tensor | None) -> Cache:
        """Keys and values of images and words: of the B rows, or of the n·B rows of conditions."""
        prompts = self._prompts(seen, conditions)
        times = len(prompts) // len(seen.state)
        tokens, valid = pad(prompts, self._longest)
        note("tokens", tokens)
        device, images = seen.images.device, seen.images.repeat(times, 1, 1)
        # Gemma scales its embeddings, not what the vision tower says.
        words = note("words", self.words(tokens.to(device)) * math.sqrt(self.config.language.width))
        if valid is not None:
            valid = F.pad(valid, (images.shape[1], 0), value=True).to(device)
        cache = self.language.cache(torch.cat([images, words.to(images.dtype)], 1), valid)
        note("prefix", cache.keys[-1])
        return cache


def description_of(config: Pi0Config, transform: Pi0Transform, tokenizer: PromptTokenizer) -> dict[str, Any]:
    """What `Pi0Policy.from_description` takes."""
    parts = {"config": asdict(config), "transform": transform.to_json(), "tokenizer": tokenizer.to_json()}
    return {"type": Pi0Policy.kind, **parts}


def time_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sines, then cosines, of t at periods from 0.004 to 4: float32[B, width].

    The angles reach 1571, so they are computed in float64, as openpi's PyTorch code does.
    """
    shortest, longest = _PERIODS
    share = torch.linspace(0.0, 1.0, width // 2, device=t.device, dtype=torch.float64)
    angles = t.double()[:, None] * (2 * math.pi / (shortest * (longest / shortest) ** share))
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def _siglip(sizes: VisionSizes) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        patch_size=sizes.patch,
        image_size=sizes.image_size,
        vision_use_head=False,
    )
