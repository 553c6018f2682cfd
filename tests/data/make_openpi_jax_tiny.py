"""Make ``tests/data/openpi_jax_tiny``: tiny random π0 and π0.5 checkpoints, written by orbax itself, and the truth.

Run in an environment of its own (Python 3.11), since the project needs neither JAX nor orbax::

    python3 -m venv /tmp/orbax && /tmp/orbax/bin/pip install jax==0.10.2 orbax-checkpoint==0.12.8 safetensors
    /tmp/orbax/bin/python tests/data/make_openpi_jax_tiny.py

The trees have the paths and axes of openpi's own modules (``models/gemma.py``, ``siglip.py``, ``pi0.py``), at sizes
where the heads' widths do not add up to the model's (2 heads of 6, widths 8 and 4), and one key/value head.

``expected_*.safetensors`` holds every tensor under its PyTorch name. It is computed from the einsum equation of each
weight, index by index in :func:`matrix`, and so shares nothing with the reader's table of transpositions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

OUT = Path(__file__).parent / "openpi_jax_tiny"
WORDS, ACTION, HEADS, HEAD = 11, 5, 2, 6
LAYERS, WIDTHS, MLPS = 2, {"": 8, "_1": 4}, {"": 10, "_1": 14}
VISION_LAYERS, VISION, VISION_HEADS, VISION_MLP, PATCH, PATCHES = 3, 6, 3, 10, 4, 4
VISION_HEAD = VISION // VISION_HEADS
Tree = dict[str, np.ndarray]


def tree(pi05: bool, rng: np.random.Generator) -> Tree:
    """Path -> array, as flax has them for openpi's modules."""

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    flat: Tree = {"PaliGemma/llm/embedder/input_embedding": random(WORDS, WIDTHS[""])}
    llm = "PaliGemma/llm/"
    for expert, width in WIDTHS.items():
        flat[f"{llm}layers/attn/q_einsum{expert}/w"] = random(LAYERS, HEADS, width, HEAD)
        flat[f"{llm}layers/attn/kv_einsum{expert}/w"] = random(LAYERS, 2, 1, width, HEAD)
        flat[f"{llm}layers/attn/attn_vec_einsum{expert}/w"] = random(LAYERS, HEADS, HEAD, width)
        flat[f"{llm}layers/mlp{expert}/gating_einsum"] = random(LAYERS, 2, width, MLPS[expert])
        flat[f"{llm}layers/mlp{expert}/linear"] = random(LAYERS, MLPS[expert], width)
        for norm, stack in (
            ("layers/pre_attention_norm", (LAYERS,)),
            ("layers/pre_ffw_norm", (LAYERS,)),
            ("final_norm", ()),
        ):
            if pi05 and expert:
                flat[f"{llm}{norm}{expert}/Dense_0/kernel"] = random(*stack, width, 3 * width)
                flat[f"{llm}{norm}{expert}/Dense_0/bias"] = random(*stack, 3 * width)
            else:
                flat[f"{llm}{norm}{expert}/scale"] = random(*stack, width)
    img, block = "PaliGemma/img/", "PaliGemma/img/Transformer/encoderblock/"
    flat[f"{img}embedding/kernel"], flat[f"{img}embedding/bias"] = random(PATCH, PATCH, 3, VISION), random(VISION)
    flat[f"{img}pos_embedding"] = random(1, PATCHES, VISION)
    flat[f"{img}head/kernel"], flat[f"{img}head/bias"] = random(VISION, WIDTHS[""]), random(WIDTHS[""])
    for part in ("scale", "bias"):
        flat[f"{img}Transformer/encoder_norm/{part}"] = random(VISION)
        for index in (0, 1):
            flat[f"{block}LayerNorm_{index}/{part}"] = random(VISION_LAYERS, VISION)
    attention = f"{block}MultiHeadDotProductAttention_0/"
    for name in ("query", "key", "value"):
        flat[f"{attention}{name}/kernel"] = random(VISION_LAYERS, VISION, VISION_HEADS, VISION_HEAD)
        flat[f"{attention}{name}/bias"] = random(VISION_LAYERS, VISION_HEADS, VISION_HEAD)
    flat[f"{attention}out/kernel"] = random(VISION_LAYERS, VISION_HEADS, VISION_HEAD, VISION)
    flat[f"{attention}out/bias"] = random(VISION_LAYERS, VISION)
    for index, (inputs, outputs) in enumerate(((VISION, VISION_MLP), (VISION_MLP, VISION))):
        flat[f"{block}MlpBlock_0/Dense_{index}/kernel"] = random(VISION_LAYERS, inputs, outputs)
        flat[f"{block}MlpBlock_0/Dense_{index}/bias"] = random(VISION_LAYERS, outputs)
    for name, inputs, outputs in projections(pi05):
        flat[f"{name}/kernel"], flat[f"{name}/bias"] = random(inputs, outputs), random(outputs)
    return flat


def projections(pi05: bool) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of openpi's own linear maps."""
    width = WIDTHS["_1"]
    own = [("action_in_proj", ACTION, width), ("action_out_proj", width, ACTION)]
    if pi05:
        return [*own, ("time_mlp_in", width, width), ("time_mlp_out", width, width)]
    return [
        *own,
        ("state_proj", ACTION, width),
        ("action_time_mlp_in", 2 * width, width),
        ("action_time_mlp_out", width, width),
    ]


def matrix(kernel: np.ndarray, axes: str, inputs: str, outputs: str) -> np.ndarray:
    """The matrix ``[out, in]`` of a linear map, entry by entry.

    Args:
        kernel: its weight in JAX.
        axes: a letter for each axis of ``kernel``.
        inputs: letters of the input's axes; several are flattened in this order.
        outputs: of the output's.
    """
    size = dict(zip(axes, kernel.shape, strict=True))
    weight = np.empty([np.prod([size[a] for a in outputs]), np.prod([size[a] for a in inputs])], kernel.dtype)
    for row, out in enumerate(product(*(range(size[a]) for a in outputs))):
        for column, into in enumerate(product(*(range(size[a]) for a in inputs))):
            index = dict(zip(outputs + inputs, out + into, strict=True))
            weight[row, column] = kernel[tuple(index[a] for a in axes)]
    return weight


def truth(flat: Tree, pi05: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its PyTorch name; a PyTorch linear map computes ``x @ weight.T + bias``."""
    root = "paligemma_with_expert.paligemma.model."
    yield f"{root}language_model.embed_tokens.weight", flat["PaliGemma/llm/embedder/input_embedding"]
    for expert, model in (("", f"{root}language_model."), ("_1", "paligemma_with_expert.gemma_expert.model.")):
        for layer in range(LAYERS):

            def of(path: str, layer: int = layer) -> np.ndarray:
                return flat[f"PaliGemma/llm/layers/{path}"][layer]

            name = f"{model}layers.{layer}."
            keys_values, gate_up = of(f"attn/kv_einsum{expert}/w"), of(f"mlp{expert}/gating_einsum")
            yield f"{name}self_attn.q_proj.weight", matrix(of(f"attn/q_einsum{expert}/w"), "ndh", "d", "nh")
            yield f"{name}self_attn.k_proj.weight", matrix(keys_values[0], "kdh", "d", "kh")
            yield f"{name}self_attn.v_proj.weight", matrix(keys_values[1], "kdh", "d", "kh")
            yield f"{name}self_attn.o_proj.weight", matrix(of(f"attn/attn_vec_einsum{expert}/w"), "nhd", "nh", "d")
            yield f"{name}mlp.gate_proj.weight", matrix(gate_up[0], "df", "d", "f")
            yield f"{name}mlp.up_proj.weight", matrix(gate_up[1], "df", "d", "f")
            yield f"{name}mlp.down_proj.weight", matrix(of(f"mlp{expert}/linear"), "fd", "f", "d")
        adaptive = pi05 and expert == "_1"
        for path, norm in (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm")):
            for layer in range(LAYERS):
                one = {k: v[layer] for k, v in flat.items() if k.startswith("PaliGemma/llm/layers/")}
                yield from norm_truth(
                    one, f"PaliGemma/llm/layers/{path}{expert}", f"{model}layers.{layer}.{norm}", adaptive
                )
        yield from norm_truth(flat, f"PaliGemma/llm/final_norm{expert}", f"{model}norm", adaptive)
    yield from vision_truth(flat, root)
    for name, _, _ in projections(pi05):
        yield f"{name}.weight", matrix(flat[f"{name}/kernel"], "io", "i", "o")
        yield f"{name}.bias", flat[f"{name}/bias"]


def norm_truth(flat: Tree, path: str, name: str, adaptive: bool) -> Iterator[tuple[str, np.ndarray]]:
    """A norm's scale, or the map that makes scale, shift and gate of the flow time."""
    if adaptive:
        yield f"{name}.dense.weight", matrix(flat[f"{path}/Dense_0/kernel"], "io", "i", "o")
        yield f"{name}.dense.bias", flat[f"{path}/Dense_0/bias"]
    else:
        yield f"{name}.weight", flat[f"{path}/scale"]


def vision_truth(flat: Tree, root: str) -> Iterator[tuple[str, np.ndarray]]:
    """SigLIP; its first layer is a convolution, ``[out, in, height, width]`` in PyTorch."""
    tower, img = f"{root}vision_tower.vision_model.", "PaliGemma/img/"
    kernel = flat[f"{img}embedding/kernel"]
    patches = np.empty((VISION, 3, PATCH, PATCH), kernel.dtype)
    for out, colour, y, x in np.ndindex(*patches.shape):
        patches[out, colour, y, x] = kernel[y, x, colour, out]
    yield f"{tower}embeddings.patch_embedding.weight", patches
    yield f"{tower}embeddings.patch_embedding.bias", flat[f"{img}embedding/bias"]
    yield f"{tower}embeddings.position_embedding.weight", flat[f"{img}pos_embedding"][0]
    yield f"{tower}post_layernorm.weight", flat[f"{img}Transformer/encoder_norm/scale"]
    yield f"{tower}post_layernorm.bias", flat[f"{img}Transformer/encoder_norm/bias"]
    yield f"{root}multi_modal_projector.linear.weight", matrix(flat[f"{img}head/kernel"], "io", "i", "o")
    yield f"{root}multi_modal_projector.linear.bias", flat[f"{img}head/bias"]
    for layer in range(VISION_LAYERS):

        def of(path: str, layer: int = layer) -> np.ndarray:
            return flat[f"{img}Transformer/encoderblock/{path}"][layer]

        name, attention = f"{tower}encoder.layers.{layer}.", "MultiHeadDotProductAttention_0/"
        for path, proj in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            yield f"{name}self_attn.{proj}.weight", matrix(of(f"{attention}{path}/kernel"), "cnh", "c", "nh")
            bias = of(f"{attention}{path}/bias")
            yield f"{name}self_attn.{proj}.bias", np.array([bias[n, h] for n, h in np.ndindex(*bias.shape)])
        yield f"{name}self_attn.out_proj.weight", matrix(of(f"{attention}out/kernel"), "nhc", "nh", "c")
        yield f"{name}self_attn.out_proj.bias", of(f"{attention}out/bias")
        for index in (0, 1):
            yield f"{name}layer_norm{index + 1}.weight", of(f"LayerNorm_{index}/scale")
            yield f"{name}layer_norm{index + 1}.bias", of(f"LayerNorm_{index}/bias")
            yield f"{name}mlp.fc{index + 1}.weight", matrix(of(f"MlpBlock_0/Dense_{index}/kernel"), "io", "i", "o")
            yield f"{name}mlp.fc{index + 1}.bias", of(f"MlpBlock_0/Dense_{index}/bias")


def save(folder: Path, flat: Tree, value: bool) -> None:
    """Write with orbax, with or without the level ``value`` that flax's ``nnx.State`` adds."""
    nested: dict[str, object] = {}
    for path, array in flat.items():
        at = nested
        *parents, leaf = [*path.split("/"), *(["value"] if value else [])]
        for parent in parents:
            at = at.setdefault(parent, {})  # type: ignore[assignment]
        at[leaf] = jnp.asarray(array)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "params", {"params": nested})
    (folder / "params" / "commit_success.txt").unlink()  # names the folder it was written to; no reader needs it


def main() -> None:
    """Write π0 (float32, as released) and π0.5 (with ``value``; a bfloat16 vision tower, as frozen parameters have)."""
    shutil.rmtree(OUT, ignore_errors=True)
    for name, pi05, value in (("pi0", False, False), ("pi05", True, True)):
        flat = tree(pi05, np.random.default_rng(int(pi05)))
        if pi05:
            flat |= {k: v.astype(ml_dtypes.bfloat16) for k, v in flat.items() if k.startswith("PaliGemma/img/")}
        save(OUT / name, flat, value)
        expected = {key: np.ascontiguousarray(array, np.float32) for key, array in truth(flat, pi05)}
        save_file(expected, OUT / f"expected_{name}.safetensors")
    stats = {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": [-1.0, -2.0], "q99": [1.0, 2.0]}
    assets = OUT / "pi05" / "assets" / "physical-intelligence" / "libero"
    assets.mkdir(parents=True)
    document = {"norm_stats": {"state": stats, "actions": stats | {"q01": None, "q99": None}}}
    (assets / "norm_stats.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
