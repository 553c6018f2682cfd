"""Reading a JAX checkpoint of π0's proportions takes little more memory than its tensors."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ript_ray.policies.pi0.orbax import _leaves

TINY = Path(__file__).parent / "data/openpi_jax_tiny/pi0"
_READ = """
import sys
from pathlib import Path
from ript_ray.policies.pi0.openpi import open_checkpoint

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split()[0]: 1e3 * int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))}

tensors = open_checkpoint(Path(sys.argv[1])).tensors
tensors.load("state_proj.bias")  # what libraries take once
before = memory()["VmRSS:"]
kept = {name: tensors.load(name) for name in tensors.shapes}
print((memory()["VmHWM:"] - before) / sum(tensor.nbytes for tensor in kept.values()))
"""


def pi0_shapes() -> dict[str, tuple[int, ...]]:
    """Arrays of π0 with a quarter of each width: 203 million numbers."""
    layers, tower = "PaliGemma/llm/layers/", "PaliGemma/img/Transformer/encoderblock/"
    attention = f"{tower}MultiHeadDotProductAttention_0/"
    shapes: dict[str, tuple[int, ...]] = {"PaliGemma/llm/embedder/input_embedding": (64_288, 512)}
    for suffix, width, mlp in (("", 512, 4096), ("_1", 256, 1024)):
        shapes[f"{layers}attn/q_einsum{suffix}/w"] = (18, 8, width, 64)
        shapes[f"{layers}attn/kv_einsum{suffix}/w"] = (18, 2, 1, width, 64)
        shapes[f"{layers}attn/attn_vec_einsum{suffix}/w"] = (18, 8, 64, width)
        shapes[f"{layers}mlp{suffix}/gating_einsum"] = (18, 2, width, mlp)
        shapes[f"{layers}mlp{suffix}/linear"] = (18, mlp, width)
        for norm in ("pre_attention_norm", "pre_ffw_norm"):
            shapes[f"{layers}{norm}{suffix}/scale"] = (18, width)
        shapes[f"PaliGemma/llm/final_norm{suffix}/scale"] = (width,)
    for part in ("query", "key", "value"):
        shapes |= {f"{attention}{part}/kernel": (27, 288, 16, 18), f"{attention}{part}/bias": (27, 16, 18)}
    shapes |= {f"{attention}out/kernel": (27, 16, 18, 288), f"{attention}out/bias": (27, 288)}
    for i, (wide, long) in enumerate(((288, 1076), (1076, 288))):
        shapes |= {f"{tower}LayerNorm_{i}/scale": (27, 288), f"{tower}LayerNorm_{i}/bias": (27, 288)}
        shapes |= {
            f"{tower}MlpBlock_0/Dense_{i}/kernel": (27, wide, long),
            f"{tower}MlpBlock_0/Dense_{i}/bias": (27, long),
        }
    for part in ("scale", "bias"):
        shapes[f"PaliGemma/img/Transformer/encoder_norm/{part}"] = (288,)
    shapes |= {"PaliGemma/img/embedding/kernel": (14, 14, 3, 288), "PaliGemma/img/embedding/bias": (288,)}
    shapes |= {"PaliGemma/img/pos_embedding": (1, 256, 288)}
    for name, wide, long in (
        ("PaliGemma/img/head", 288, 512),
        ("state_proj", 32, 256),
        ("action_in_proj", 32, 256),
        ("action_out_proj", 256, 32),
        ("action_time_mlp_in", 512, 256),
        ("action_time_mlp_out", 256, 256),
    ):
        shapes |= {f"{name}/kernel": (wide, long), f"{name}/bias": (long,)}
    return shapes


@pytest.mark.slow
def test_reading_takes_at_most_a_fifth_more_than_the_tensors(tmp_path: Path) -> None:
    tensorstore = importlib.import_module("tensorstore")
    params = tmp_path / "params"
    params.mkdir()
    metadata = json.loads((TINY / "params/_METADATA").read_text())
    (params / "_METADATA").write_text(json.dumps(metadata))
    rng, shapes = np.random.default_rng(0), pi0_shapes()
    leaves = _leaves(metadata, TINY)
    assert shapes.keys() == leaves.keys()
    for path, array in leaves.items():
        place = {"driver": "ocdbt", "base": f"file://{params}/", "path": array}
        values = rng.normal(0.0, 0.02, shapes[path]).astype(np.float32)
        # One chunk for each array, and the compressor, are orbax's.
        layout = {
            "shape": values.shape,
            "chunks": values.shape,
            "dtype": "<f4",
            "compressor": {"id": "zstd", "level": 1},
        }
        tensorstore.open({"driver": "zarr", "kvstore": place, "metadata": layout, "create": True}).result().write(
            values
        ).result()
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(tmp_path)], capture_output=True, text=True, timeout=500, check=True
    )
    assert 1.0 <= float(done.stdout) <= 1.2
