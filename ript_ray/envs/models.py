"""Compiled MuJoCo models, kept on disk and shared by the processes of a node.

Compiling one takes seconds and a gigabyte, loading it a fraction of both. Beside the model (``.mjb``) lies a copy of
its memory (``.pages``): every process maps that over its own, so the textures and meshes are there once for all of
them. What a process changes in its model (mapped privately) stays its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mujoco

log = logging.getLogger(__name__)

_FORMAT = "1"
"""To be raised when what the key covers changes."""
_MAP_FIXED = 0x10
_LEAVE_FREE = 2_000_000_000
"""Bytes of the disk that the cache does not touch."""
_ASSET = re.compile(r'file="([^"]+)"')


def cache_folder() -> Path:
    """Where models are kept: ``$RIPT_RAY_CACHE/models``, by default in the user's cache folder."""
    root = os.environ.get("RIPT_RAY_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ript_ray"
    )
    return Path(root) / "models"


def cache_limit() -> int:
    """Bytes that the models may take: ``$RIPT_RAY_CACHE_GB``, 10 by default; the least recently used go first."""
    return int(float(os.environ.get("RIPT_RAY_CACHE_GB", "10")) * 1e9)


def load_model(xml: str) -> mujoco.MjModel:
    """The compiled model of an MJCF text, from the cache if it is there.

    Processes may do this at the same time: files appear complete or not at all. What cannot be read is compiled anew,
    and a cache that cannot be written to is done without.
    """
    file = cache_folder() / f"{model_key(xml)}.mjb"
    model = _read(file)
    try:
        if model is None:
            model = mujoco.MjModel.from_xml_string(xml)
            _store(file, model.nbuffer, lambda name: mujoco.mj_saveModel(model, name))
        if sys.platform == "linux":
            _share(model, file)
    except OSError as error:
        log.warning("the compiled model is not kept: %s", error)
    return model


def model_key(xml: str) -> str:
    """Fingerprint of all that shapes the compiled model: text, contents of every file it names, MuJoCo's version."""
    digest = hashlib.sha256(f"{_FORMAT} {mujoco.__version__} {os.uname().machine}".encode())

    def by_content(match: re.Match[str]) -> str:
        # The same files elsewhere give the same model, so the path is replaced by what is there.
        return f'file="{hashlib.sha256(Path(match[1]).read_bytes()).hexdigest()}"'

    digest.update(_ASSET.sub(by_content, xml).encode())
    return digest.hexdigest()[:32]


def _read(file: Path) -> mujoco.MjModel | None:
    if not file.is_file():
        return None
    try:
        model = mujoco.MjModel.from_binary_path(str(file))
    except (OSError, ValueError, mujoco.FatalError) as error:
        log.warning("%s cannot be read (%s) and is made again", file, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # for the choice of what to remove
    return model


def _share(model: mujoco.MjModel, file: Path) -> None:
    """Replace this process's copy of the model by the node's, page by page; the contents are the same."""
    # All arrays lie in one block, from the first field of mjModel's list to the last.
    begin, last = model.qpos0.ctypes.data, model.names_map
    length = last.ctypes.data + last.nbytes - begin
    if not 0 < length <= model.nbuffer:
        raise OSError(f"MuJoCo {mujoco.__version__} lays its model out in another way than expected")
    page = mmap.PAGESIZE
    offset = begin % page  # a file's pages can only be mapped to addresses of the same offset
    pages = file.with_name(f"{file.stem}-{offset}.pages")
    if not pages.is_file() or pages.stat().st_size != offset + length:
        _store(pages, length, lambda name: Path(name).write_bytes(bytes(offset) + ctypes.string_at(begin, length)))
    first = begin - offset + (page if offset else 0)
    whole = (begin + length - first) // page * page
    descriptor = os.open(pages, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
        if libc.mmap(first, whole, protection, flags, descriptor, first - begin + offset) != first:
            raise OSError(ctypes.get_errno(), f"{pages} cannot be mapped")
    finally:
        os.close(descriptor)


def _store(file: Path, size: int, write: Callable[[str], object]) -> None:
    """Have ``write`` make a file, which then appears under its name complete; remove what was not used for long."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(file.parent).free < size + _LEAVE_FREE:
        raise OSError(f"less than {_LEAVE_FREE / 1e9:g} GB would be free in {file.parent}")
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    os.close(handle)
    try:
        write(name)
        os.chmod(name, 0o644)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
    _prune(file.parent, cache_limit(), keep=file.stem[:32])


def _prune(folder: Path, limit: int, keep: str) -> None:
    """Remove the least recently used files until the rest fits, but none of the model in use."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            return
        if not path.name.startswith(keep):
            path.unlink(missing_ok=True)
            total -= size
