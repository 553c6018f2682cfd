"""The report page of a running job, over HTTP."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ript_ray.errors import UserError
from ript_ray.report import CAPTIONS, VIDEOS, report_html, report_json
from ript_ray.runs import Run

log = logging.getLogger("ript_ray")

_SHARE = 0.05
"""Of the time, that reading a run for those who look at its page may take."""


@contextlib.contextmanager
def report_server(run_dir: Path, host: str, port: int | None) -> Iterator[str | None]:
    """Serve the report of a run for the time; yields its address, or None when ``port`` is.

    Args:
        run_dir: of the run.
        host: address to listen at; 127.0.0.1 shows it to this machine alone.
        port: 0 takes a free one.

    Raises:
        UserError: when the port is taken.
    """
    if port is None:
        yield None
        return

    class Handler(_Handler):
        folder = run_dir
        data = _Data(run_dir)

    try:
        server = _Server((host, port), Handler)
    except OSError as error:
        raise UserError(
            f"run.report_port={port}: cannot listen at {host}:{port} ({error.strerror}); choose another, or 0 for any"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="report", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who went away is no news for who trains; the rest goes into the log of the run."""
        gone = isinstance(sys.exception(), (ConnectionError, TimeoutError))
        log.log(logging.DEBUG if gone else logging.ERROR, "the report page was not delivered", exc_info=True)


class _Data:
    """What the page shows, for all who look at it; read anew when files have changed, and less often the longer it
    takes.
    """

    def __init__(self, run_dir: Path) -> None:
        names = ("metrics.jsonl", "journal.jsonl", "summary.json", f"{VIDEOS}/{CAPTIONS}")
        self._run_dir, self._files = run_dir, [run_dir / name for name in names]
        self._lock = threading.Lock()
        self._seen: list[tuple[int, int]] | None = None
        self._text = ""
        self._next = 0.0

    def read(self) -> str:
        """As `report_json` gives it."""
        with self._lock:
            began = time.monotonic()
            stamps = [(s.st_size, s.st_mtime_ns) for s in (file.stat() for file in self._files if file.exists())]
            if began >= self._next and stamps != self._seen:
                self._text, self._seen = report_json(Run.load(self._run_dir)), stamps
                self._next = began + (time.monotonic() - began) / _SHARE
            return self._text


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    data: _Data

    def do_GET(self) -> None:
        """The page, its data, or a video."""
        path = self.path.split("?")[0]
        video = self.folder / VIDEOS / path.removeprefix(f"/{VIDEOS}/")
        if path == "/":
            self._answer(report_html(self.data.read()).encode(), "text/html; charset=utf-8")
        elif path == "/report.json":
            self._answer(self.data.read().encode(), "application/json")
        elif path.startswith(f"/{VIDEOS}/") and video.parent == self.folder / VIDEOS and video.suffix == ".mp4":
            try:
                self._answer(video.read_bytes(), "video/mp4", self.headers.get("Range"))
            except OSError:  # a newer one has taken its place
                self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, body: bytes, kind: str, wanted: str | None = None) -> None:
        """Send it, or the one range of its bytes that is wanted: some browsers play no video without."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        first = int(match[1]) if match else 0
        last = min(int(match[2]), len(body) - 1) if match and match[2] else len(body) - 1
        if first > last and body:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if match else HTTPStatus.OK)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.send_header("Accept-Ranges", "bytes" if kind == "video/mp4" else "none")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body[first : last + 1])

    def log_message(self, format: str, *args: object) -> None:
        """Into the log of the run instead of between the lines of the progress bar."""
        log.debug(format, *args)
