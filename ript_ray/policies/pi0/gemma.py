"""Gemma's decoder as π0 uses it: one stack for images and words, a smaller one for actions that reads its keys.

Names of modules and tensors are those of published checkpoints. The prefix never looks at what follows, so its keys
and values are computed once for an observation (`Cache`) and serve every Euler step exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class GemmaSizes:
    """Sizes of a stack; those of a pair must agree in everything but ``width`` and ``mlp``."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of N tokens that later ones may attend to."""

    keys: tuple[torch.Tensor, ...]
    """Of each layer, rotated: [B, kv_heads, N, head_dim]."""
    values: tuple[torch.Tensor, ...]
    """The same shapes."""
    valid: torch.Tensor | None
    """bool[B, N], False for padding; None when there is none, which spares the attention its mask."""
    length: torch.Tensor
    """Valid tokens, which is the next one's position: int64[B]."""

    def repeat(self, times: int) -> Cache:
        """Copies of the rows, one after the other."""
        if times == 1:
            return self
        keys, values = (tuple(x.repeat(times, 1, 1, 1) for x in xs) for xs in (self.keys, self.values))
        valid = None if self.valid is None else self.valid.repeat(times, 1)
        return Cache(keys, values, valid, self.length.repeat(times))

    def extended(self, other: Cache) -> Cache:
        """With the tokens of ``other``, which were computed on top of this one and hold no padding."""
        pairs = zip(self.keys, other.keys, strict=True), zip(self.values, other.values, strict=True)
        keys, values = (tuple(torch.cat(pair, 2) for pair in xs) for xs in pairs)
        tokens = other.keys[0].shape[2]
        valid = None if self.valid is None else F.pad(self.valid, (0, tokens), value=True)
        return Cache(keys, values, valid, self.length + tokens)


class Gemma(nn.Module):
    """A stack of layers over embedded tokens that all see each other, and those of a cache.

    Args:
        sizes: of the stack.
        modulated: the norms are scaled, shifted and gated by a condition of ``width`` numbers (adaRMS, π0.5).
    """

    def __init__(self, sizes: GemmaSizes, modulated: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.checkpointing = False
        """Compute a layer again in the backward pass instead of keeping its activations."""
        self.layers = nn.ModuleList(_Layer(sizes, modulated) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width, modulated)

    def forward(self, x: torch.Tensor, past: Cache | None, modulation: torch.Tensor | None = None) -> torch.Tensor:
        """Outputs of tokens that attend to the cache and to each other: [B, S, width], none of them padding."""
        rotation = self._rotation(self._positions(x, past))
        mask = _mask(past, x)
        for index, layer in enumerate(self.layers):
            x, _, _ = self._run(layer, x, rotation, mask, _of_layer(past, index), modulation)
        return self.norm(x, modulation)[0]

    def cache(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None,
        past: Cache | None = None,
        modulation: torch.Tensor | None = None,
    ) -> Cache:
        """Keys and values of tokens [B, S, width] that attend to ``past`` and to each other.

        ``valid``, bool[B, S], says which of them are no padding; there may be some only without ``past``. Of the last
        layer only these are computed: nothing reads its output.
        """
        positions = self._positions(x, past) if valid is None else valid.long().cumsum(1) - 1
        mask = _mask(past, x) if valid is None else valid[:, None, None, :]
        rotation = self._rotation(positions)
        keys, values = [], []
        for index, layer in enumerate(self.layers[:-1]):
            x, key, value = self._run(layer, x, rotation, mask, _of_layer(past, index), modulation)
            keys.append(key)
            values.append(value)
        _, key, value = self.layers[-1](x, rotation, mask, _of_layer(past, len(keys)), modulation, onward=False)
        return Cache((*keys, key), (*values, value), valid, positions[:, -1] + 1)

    def _run(
        self, layer: nn.Module, *arguments: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.checkpointing and torch.is_grad_enabled():
            result = checkpoint(layer, *arguments, use_reentrant=False)
        else:
            result = layer(*arguments)
        x, key, value = result
        return x, key, value

    def _positions(self, x: torch.Tensor, past: Cache | None) -> torch.Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        return steps.expand(len(x), -1) if past is None else past.length[:, None] + steps

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of rotary embeddings at positions int64[B, S]: float32[B, 1, S, head_dim / 2]."""
        half = self.sizes.head_dim // 2
        frequency = 10_000.0 ** -(torch.arange(half, device=positions.device, dtype=torch.float32) / half)
        angles = positions[:, None, :, None].float() * frequency
        return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    """x/√(mean x² + 1e-6) times 1 + weight, in float32; with a condition its scale, shift and gate are linear in it.

    Args:
        width: of x, and of the condition.
        modulated: take a condition (adaRMS, openpi's ``gemma.py``).
    """

    def __init__(self, width: int, modulated: bool) -> None:
        super().__init__()
        if modulated:
            self.dense = nn.Linear(width, 3 * width)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)
        else:
            self.weight = nn.Parameter(torch.zeros(width))
        self.modulated = modulated

    def forward(self, x: torch.Tensor, modulation: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The normalised x [B, S, width], and the gate of the residual branch that begins here, if there is one."""
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        if not self.modulated:
            return (normed * (1.0 + self.weight.float())).to(x.dtype), None
        if modulation is None:
            raise ValueError("a modulated stack needs its condition")
        scale, shift, gate = self.dense(modulation.to(self.dense.weight.dtype))[:, None].chunk(3, dim=-1)
        return (normed * (1.0 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        inner, shared = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.width, inner, bias=False)
        self.k_proj = nn.Linear(sizes.width, shared, bias=False)
        self.v_proj = nn.Linear(sizes.width, shared, bias=False)
        self.o_proj = nn.Linear(inner, sizes.width, bias=False)


class _MLP(nn.Module):
    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.width, sizes.mlp, bias=False)
        self.up_proj = nn.Linear(sizes.width, sizes.mlp, bias=False)
        self.down_proj = nn.Linear(sizes.mlp, sizes.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, sizes: GemmaSizes, modulated: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.input_layernorm = RMSNorm(sizes.width, modulated)
        self.self_attn = _Attention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.width, modulated)
        self.mlp = _MLP(sizes)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor] | None,
        modulation: torch.Tensor | None,
        onward: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens after this layer, or as they came where nothing goes on from them; and their keys and values."""
        normed, gate = self.input_layernorm(x, modulation)
        key, value = self._keys_and_values(normed, rotation)
        if not onward:
            return x, key, value
        keys, values = (key, value) if past is None else (torch.cat([past[0], key], 2), torch.cat([past[1], value], 2))
        x = _add(x, self.self_attn.o_proj(self._attend(normed, rotation, keys, values, mask)), gate)
        normed, gate = self.post_attention_layernorm(x, modulation)
        return _add(x, self.mlp(normed), gate), key, value

    def _keys_and_values(
        self, normed: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, width] → [B, kv_heads, S, head_dim] twice, the keys rotated."""
        heads = (self.sizes.kv_heads, self.sizes.head_dim)
        key, value = (
            p(normed).unflatten(-1, heads).transpose(1, 2) for p in (self.self_attn.k_proj, self.self_attn.v_proj)
        )
        return _rotate(key, rotation), value

    def _attend(
        self,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Softmax attention, float[B, S, heads·head_dim].

        Query heads that share a key are laid one after the other along the sequence, so that no key is copied.
        """
        kv_heads, head_dim = self.sizes.kv_heads, self.sizes.head_dim
        group = self.sizes.heads // kv_heads
        query = _rotate(_split(self.self_attn.q_proj(normed), (self.sizes.heads, head_dim)), rotation)
        batch, tokens = len(query), query.shape[2]
        query = query.reshape(batch, kv_heads, group * tokens, head_dim)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1 / math.sqrt(head_dim))
        return out.reshape(batch, self.sizes.heads, tokens, head_dim).transpose(1, 2).flatten(2)


def _split(x: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """[B, S, heads·head_dim] → [B, heads, S, head_dim]."""
    return x.view(*x.shape[:2], *heads).transpose(1, 2)


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of [B, heads, S, head_dim], first half against second, in float32."""
    cosine, sine = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)


def _add(x: torch.Tensor, change: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x + change if gate is None else x + change * gate


def _mask(past: Cache | None, x: torch.Tensor) -> torch.Tensor | None:
    """What tokens [B, S, …] may attend to, broadcast over heads and tokens: bool[B, 1, 1, N + S]; None for all."""
    if past is None or past.valid is None:
        return None
    return F.pad(past.valid, (0, x.shape[1]), value=True)[:, None, None, :]


def _of_layer(past: Cache | None, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if past is None else (past.keys[index], past.values[index])
