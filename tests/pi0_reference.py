"""π0 and π0.5 in plain NumPy float64: one joint pass over all tokens, without any cache.

Weights carry the names of openpi's PyTorch checkpoints. Letters in shapes: B batch, C cameras, N text tokens,
P prefix tokens, L all tokens, W width, T horizon, D action dimension, S state dimension, n heads, h head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]

VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
MASKED = -2.3819763e38


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the weights do not tell; `patch` is the side of a square patch in pixels."""

    vision_heads: int
    patch: int
    heads: int
    kv_heads: int
    head_dim: int
    horizon: int
    pi05: bool


def _get(weights: Weights, name: str) -> Array:
    return np.asarray(weights[name], dtype=np.float64)


def _linear(weights: Weights, name: str, x: Array) -> Array:
    """x[..., in] → [..., out]; the bias is optional."""
    y = x @ _get(weights, f"{name}.weight").T
    return y + _get(weights, f"{name}.bias") if f"{name}.bias" in weights else y


def _layer_norm(weights: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return normed * _get(weights, f"{name}.weight") + _get(weights, f"{name}.bias")


def _rms_norm(weights: Weights, name: str, x: Array, cond: Array | None) -> tuple[Array, Array]:
    """The normalised x[B, L, W] and the gate of its residual branch; with cond[B, W] the norm is adaptive."""
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    if cond is None:
        return normed * (1.0 + _get(weights, f"{name}.weight")), np.ones(1)
    scale, shift, gate = np.split(_linear(weights, f"{name}.dense", cond)[:, None, :], 3, axis=-1)
    return normed * (1.0 + scale) + shift, gate


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def _feed_forward(weights: Weights, layer: str, x: Array, cond: Array | None) -> Array:
    y, gate = _rms_norm(weights, f"{layer}post_attention_layernorm", x, cond)
    hidden = _gelu(_linear(weights, f"{layer}mlp.gate_proj", y)) * _linear(weights, f"{layer}mlp.up_proj", y)
    return x + gate * _linear(weights, f"{layer}mlp.down_proj", hidden)


def _layers(weights: Weights, prefix: str) -> int:
    """How many layers exist below `prefix`."""
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in weights if name.startswith(prefix))


def _attention(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    """q[B, L, n, h], k and v[B, L, kv, h], allowed bool[B, L, L] (query, key) → [B, L, n·h]."""
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if allowed is not None:
        logits = np.where(allowed[:, None], logits, MASKED)
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    return (weight @ v).transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def _rope(x: Array, positions: Array) -> Array:
    """Rotates x[B, L, n, h] by positions[B, L]; the first half of h pairs with the second."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] / 10_000.0 ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def _vision(weights: Weights, sizes: Sizes, images: Array) -> Array:
    """SigLIP and the projector: images[M, H, W, 3] in [-1, 1] → [M, patches, width of the language model]."""
    count, height, width, _ = images.shape
    p = sizes.patch
    patches = images.reshape(count, height // p, p, width // p, p, 3).transpose(0, 1, 3, 5, 2, 4)
    kernel = _get(weights, f"{VISION}embeddings.patch_embedding.weight")
    x = patches.reshape(count, -1, 3 * p * p) @ kernel.reshape(len(kernel), -1).T
    x = x + _get(weights, f"{VISION}embeddings.patch_embedding.bias")
    x = x + _get(weights, f"{VISION}embeddings.position_embedding.weight")
    for i in range(_layers(weights, f"{VISION}encoder.layers.")):
        layer = f"{VISION}encoder.layers.{i}."
        y = _layer_norm(weights, f"{layer}layer_norm1", x)
        q, k, v = (
            _linear(weights, f"{layer}self_attn.{name}_proj", y).reshape(*y.shape[:2], sizes.vision_heads, -1)
            for name in "qkv"
        )
        x = x + _linear(weights, f"{layer}self_attn.out_proj", _attention(q, k, v, None))
        y = _layer_norm(weights, f"{layer}layer_norm2", x)
        x = x + _linear(weights, f"{layer}mlp.fc2", _gelu(_linear(weights, f"{layer}mlp.fc1", y)))
    return _linear(weights, PROJECTOR, _layer_norm(weights, f"{VISION}post_layernorm", x))


def prefix(
    weights: Weights, sizes: Sizes, pixels: Array, tokens: Array, token_mask: Array, image_mask: Array | None = None
) -> tuple[Array, Array]:
    """Embeds what is seen and read, images first; without `image_mask` every camera counts.

    pixels float[B, C, H, W, 3] in [-1, 1], tokens int[B, N], token_mask bool[B, N], image_mask bool[B, C]
    → embeddings float64[B, P, W], mask bool[B, P].
    """
    batch, cameras = pixels.shape[:2]
    table = _get(weights, f"{LANGUAGE}embed_tokens.weight")
    images = _vision(weights, sizes, pixels.astype(np.float64).reshape(-1, *pixels.shape[2:]))
    present = np.ones((batch, cameras), dtype=bool) if image_mask is None else image_mask.astype(bool)
    mask = np.concatenate([np.repeat(present, images.shape[1], axis=1), token_mask.astype(bool)], axis=1)
    return np.concatenate([images.reshape(batch, -1, table.shape[1]), table[tokens] * np.sqrt(table.shape[1])], 1), mask


def time_embedding(t: Array, width: int) -> Array:
    """t[B] → [B, width], sines then cosines, with periods from 0.004 to 4."""
    period = 4e-3 * (4.0 / 4e-3) ** np.linspace(0.0, 1.0, width // 2)
    angle = 2.0 * np.pi * np.asarray(t, dtype=np.float64)[:, None] / period
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def _joint(
    weights: Weights, sizes: Sizes, seen: Array, suffix: Array, cond: Array | None, mask: Array
) -> tuple[Array, Array]:
    """All layers over the joined tokens: seen[B, P, W], suffix[B, L - P, expert width], cond[B, expert width],
    mask bool[B, L] → the two streams after their last norms."""
    edge = seen.shape[1]
    starts_block = np.zeros(mask.shape[1], dtype=int)
    starts_block[[edge, -sizes.horizon]] = 1  # the state (π0 only) and the first action
    block = np.cumsum(starts_block)
    allowed = (block[None, :] <= block[:, None]) & mask[:, None, :] & mask[:, :, None]
    positions = np.cumsum(mask, axis=1) - 1
    for i in range(_layers(weights, f"{LANGUAGE}layers.")):
        first, second = f"{LANGUAGE}layers.{i}.", f"{EXPERT}layers.{i}."
        a, gate_a = _rms_norm(weights, f"{first}input_layernorm", seen, None)
        b, gate_b = _rms_norm(weights, f"{second}input_layernorm", suffix, cond)
        q, k, v = (
            np.concatenate(
                [_linear(weights, f"{first}self_attn.{n}_proj", a), _linear(weights, f"{second}self_attn.{n}_proj", b)],
                axis=1,
            ).reshape(*mask.shape, -1, sizes.head_dim)
            for n in "qkv"
        )
        attended = _attention(_rope(q, positions), _rope(k, positions), v, allowed)
        seen = seen + gate_a * _linear(weights, f"{first}self_attn.o_proj", attended[:, :edge])
        suffix = suffix + gate_b * _linear(weights, f"{second}self_attn.o_proj", attended[:, edge:])
        seen = _feed_forward(weights, first, seen, None)
        suffix = _feed_forward(weights, second, suffix, cond)
    return _rms_norm(weights, f"{LANGUAGE}norm", seen, None)[0], _rms_norm(weights, f"{EXPERT}norm", suffix, cond)[0]


def velocity(
    weights: Weights,
    sizes: Sizes,
    pixels: Array,
    image_mask: Array,
    tokens: Array,
    token_mask: Array,
    state: Array,
    x: Array,
    t: Array,
    state_offset: Array | None = None,
) -> Array:
    """The velocity field noise - action at the noisy actions x and the times t (1 is noise).

    pixels float[B, C, H, W, 3] in [-1, 1], image_mask bool[B, C], tokens int[B, N], token_mask bool[B, N],
    state float[B, S] (padded; π0.5 ignores it), x float[B, T, D], t float[B], state_offset float[B, expert width]
    (added to the embedded state, π0 only) → float64[B, T, D].
    """
    seen, seen_mask = prefix(weights, sizes, pixels, tokens, token_mask, image_mask)
    actions = _linear(weights, "action_in_proj", x.astype(np.float64))
    time = time_embedding(t, actions.shape[-1])
    cond: Array | None = None
    if sizes.pi05:
        suffix = actions
        cond = _silu(_linear(weights, "time_mlp_out", _silu(_linear(weights, "time_mlp_in", time))))
    else:
        both = np.concatenate([actions, np.broadcast_to(time[:, None], actions.shape)], axis=-1)
        actions = _linear(weights, "action_time_mlp_out", _silu(_linear(weights, "action_time_mlp_in", both)))
        embedded = _linear(weights, "state_proj", state.astype(np.float64))
        embedded = embedded if state_offset is None else embedded + state_offset
        suffix = np.concatenate([embedded[:, None], actions], axis=1)
    mask = np.concatenate([seen_mask, np.ones(suffix.shape[:2], dtype=bool)], axis=1)
    _, out = _joint(weights, sizes, seen, suffix, cond, mask)
    return _linear(weights, "action_out_proj", out[:, -sizes.horizon :])


def sample(
    weights: Weights,
    sizes: Sizes,
    pixels: Array,
    image_mask: Array,
    tokens: Array,
    token_mask: Array,
    state: Array,
    noise: Array,
    steps: int = 10,
    state_offset: Array | None = None,
) -> Array:
    """Euler from the noise float[B, T, D] at t = 1 to the actions at t = 0; the rest as in `velocity`."""
    x = noise.astype(np.float64)
    for step in range(steps):
        t = np.full(len(x), 1.0 - step / steps)
        x = x - velocity(weights, sizes, pixels, image_mask, tokens, token_mask, state, x, t, state_offset) / steps
    return x


def random_weights(
    sizes: Sizes,
    *,
    vision_width: int,
    vision_mlp: int,
    vision_layers: int,
    image: int,
    width: int,
    mlp: int,
    expert_width: int,
    expert_mlp: int,
    layers: int,
    vocab: int,
    action_dim: int,
    state_dim: int,
    seed: int,
) -> dict[str, Array]:
    """Random float32 weights under all the names that the model reads; `image` is the side of an image in pixels."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}

    def normal(name: str, *shape: int, scale: float) -> None:
        made[name] = (rng.normal(size=shape) * scale).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        normal(f"{name}.weight", outputs, inputs, scale=inputs**-0.5)
        if bias:
            normal(f"{name}.bias", outputs, scale=0.1)

    def layer_norm(name: str) -> None:
        normal(f"{name}.weight", vision_width, scale=0.1)
        made[f"{name}.weight"] += 1
        normal(f"{name}.bias", vision_width, scale=0.1)

    def gemma(root: str, size: int, hidden: int, adaptive: bool) -> None:
        def rms_norm(name: str) -> None:
            if adaptive:
                linear(f"{name}.dense", size, 3 * size)
                made[f"{name}.dense.bias"][2 * size :] += 0.5
            else:
                normal(f"{name}.weight", size, scale=0.1)

        for i in range(layers):
            layer = f"{root}layers.{i}."
            rms_norm(f"{layer}input_layernorm")
            for kind, count in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
                linear(f"{layer}self_attn.{kind}_proj", size, count * sizes.head_dim, bias=False)
            linear(f"{layer}self_attn.o_proj", sizes.heads * sizes.head_dim, size, bias=False)
            rms_norm(f"{layer}post_attention_layernorm")
            linear(f"{layer}mlp.gate_proj", size, hidden, bias=False)
            linear(f"{layer}mlp.up_proj", size, hidden, bias=False)
            linear(f"{layer}mlp.down_proj", hidden, size, bias=False)
        rms_norm(f"{root}norm")

    patch = f"{VISION}embeddings.patch_embedding"
    normal(f"{patch}.weight", vision_width, 3, sizes.patch, sizes.patch, scale=(3 * sizes.patch**2) ** -0.5)
    normal(f"{patch}.bias", vision_width, scale=0.1)
    normal(f"{VISION}embeddings.position_embedding.weight", (image // sizes.patch) ** 2, vision_width, scale=0.3)
    for i in range(vision_layers):
        layer = f"{VISION}encoder.layers.{i}."
        layer_norm(f"{layer}layer_norm1")
        layer_norm(f"{layer}layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{name}", vision_width, vision_width)
        linear(f"{layer}mlp.fc1", vision_width, vision_mlp)
        linear(f"{layer}mlp.fc2", vision_mlp, vision_width)
    layer_norm(f"{VISION}post_layernorm")
    linear(PROJECTOR, vision_width, width)
    normal(f"{LANGUAGE}embed_tokens.weight", vocab, width, scale=width**-0.5)
    gemma(LANGUAGE, width, mlp, adaptive=False)
    gemma(EXPERT, expert_width, expert_mlp, adaptive=sizes.pi05)
    linear("action_in_proj", action_dim, expert_width)
    linear("action_out_proj", expert_width, action_dim)
    if sizes.pi05:
        linear("time_mlp_in", expert_width, expert_width)
        linear("time_mlp_out", expert_width, expert_width)
    else:
        linear("state_proj", state_dim, expert_width)
        linear("action_time_mlp_in", 2 * expert_width, expert_width)
        linear("action_time_mlp_out", expert_width, expert_width)
    return made
