"""The cache of compiled models, and the choice of what renders."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mujoco
import numpy as np
import pytest

from ript_ray.envs import rendering
from ript_ray.envs.models import cache_folder, load_model, model_key
from ript_ray.errors import UserError

XML = """<mujoco>
  <asset><mesh name="m" file="{mesh}"/></asset>
  <worldbody><body><freejoint/><geom type="mesh" mesh="m"/></body><geom type="plane" size="1 1 .1"/></worldbody>
</mujoco>"""


@pytest.fixture
def xml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RIPT_RAY_CACHE", str(tmp_path / "cache"))
    mesh = tmp_path / "m.obj"
    mesh.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    return XML.format(mesh=mesh)


def assert_same_model(a: mujoco.MjModel, b: mujoco.MjModel) -> None:
    for name in dir(a):
        value = getattr(a, name)
        if isinstance(value, np.ndarray) and name != "_sizes":
            np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_a_cached_model_is_the_compiled_one_and_changes_stay_private(xml: str) -> None:
    compiled = mujoco.MjModel.from_xml_string(xml)
    assert_same_model(load_model(xml), compiled)
    (file,) = cache_folder().glob("*.mjb")
    written = file.stat().st_ino
    again, third = load_model(xml), load_model(xml)
    assert_same_model(again, compiled)
    again.body_pos[1] = 7.0
    assert third.body_pos[1, 0] == 0.0
    assert_same_model(load_model(xml), compiled)
    (file,) = cache_folder().glob("*.mjb")
    assert file.stat().st_ino == written


def test_the_key_covers_text_and_files(xml: str, tmp_path: Path) -> None:
    key = model_key(xml)
    assert model_key(xml.replace('size="1 1 .1"', 'size="2 1 .1"')) != key
    elsewhere = tmp_path / "elsewhere.obj"
    elsewhere.write_bytes((tmp_path / "m.obj").read_bytes())
    assert model_key(xml.replace("m.obj", "elsewhere.obj")) == key
    elsewhere.write_text(elsewhere.read_text().replace("v 1 0 0", "v 2 0 0"))
    assert model_key(xml.replace("m.obj", "elsewhere.obj")) != key


@pytest.mark.parametrize("damage", [b"", b"no model at all", None])
def test_a_damaged_file_is_made_again(xml: str, damage: bytes | None) -> None:
    compiled = load_model(xml)
    for file in cache_folder().iterdir():
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert_same_model(load_model(xml), compiled)
    assert_same_model(load_model(xml), compiled)


def test_a_folder_that_cannot_be_written_is_done_without(xml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIPT_RAY_CACHE", "/proc/nowhere")
    assert load_model(xml).nmesh == 1


def test_the_least_recently_used_models_make_room(xml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [xml.replace('size="1 1 .1"', f'size="{size} 1 .1"') for size in (1, 2, 3)]
    load_model(variants[0])
    size = sum(file.stat().st_size for file in cache_folder().iterdir())
    monkeypatch.setenv("RIPT_RAY_CACHE_GB", str(2.5 * size / 1e9))
    for file in cache_folder().iterdir():
        os.utime(file, (1, 1))
    load_model(variants[1])
    load_model(variants[2])
    kept = {file.name[:32] for file in cache_folder().iterdir()}
    assert kept == {model_key(variants[1]), model_key(variants[2])}


def _load(xml: str, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    for _ in range(20):
        for file in cache_folder().glob("*.mjb"):
            file.unlink(missing_ok=True)
        assert load_model(xml).nmesh == 1


def test_many_writers_at_once_do_no_harm(xml: str) -> None:
    context = multiprocessing.get_context("spawn")
    start = time.time() + 4.0
    children = [context.Process(target=_load, args=(xml, start)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert not list(cache_folder().glob("*.part"))


def test_what_renders_is_found_out_in_a_child_with_a_time_limit() -> None:
    program = "from ript_ray.envs import rendering; print(rendering.choose())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(("egl (", "osmesa ("))
    if "llvmpipe" in done.stdout:  # nobody's CUDA device
        assert set(rendering.egl_cuda_devices()) == {None}


@pytest.mark.libero
def test_a_gpu_that_is_not_named_by_its_number_does_not_mislead_the_renderer() -> None:
    program = """
from ript_ray.envs import make, rendering
rendering.choose("GPU-1f")
observation, _ = make("libero_object/0", 64, 10).reset(seed=0)
print(observation["agentview"].std())
"""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "GPU-1f"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=variables)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 1


@pytest.mark.parametrize(("program", "words"), [("import time; time.sleep(60)", "no answer"), ("1/0", "ZeroDivision")])
def test_a_renderer_that_hangs_or_fails_is_passed_over(
    program: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "_PROBE", program)
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "RIPT_RAY_RENDERER"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(UserError, match=f"egl: .*{words}"):
        rendering.choose(timeout_s=1.0)


@pytest.mark.parametrize(
    ("cuda", "egl", "index"),
    [("0", (None, 1, 0), 2), ("1", (None, 1, 0), 1), ("3,1", (3, 1), 0), ("0", (None,), None), ("GPU-1f", (0,), None)],
)
def test_egl_devices_are_matched_to_cuda_devices(cuda: str, egl: tuple[int | None, ...], index: int | None) -> None:
    assert rendering.match_device(cuda, egl) == index


def test_a_shared_model_survives_the_end_of_the_process_that_made_it(xml: str) -> None:
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_load_and_die, args=(xml,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL
    assert_same_model(load_model(xml), mujoco.MjModel.from_xml_string(xml))


def _load_and_die(xml: str) -> None:
    load_model(xml)
    os.kill(os.getpid(), signal.SIGKILL)
