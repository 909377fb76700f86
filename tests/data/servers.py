"""A small HTTP server over a folder, with ranges as object stores have them, and faults that a test plants."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Fault = Callable[["Handler", bytes, int], bool]
"""Given the request, what would be sent and from which byte: answers instead and returns True, or leaves it alone."""


@dataclass
class Server:
    """A server that is up.

    Attributes:
        url: of the folder.
        asked: (method, path, Range header) of each request so far.
        faults: asked before each GET, in this order.
        ranges: whether requests for ranges are understood.
        headers: sent with each file, by its path.
        cut_headers: sent where a fault cuts the answer short.
    """

    url: str
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ranges: bool = True
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    cut_headers: dict[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server
    folder: Path

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def log_message(self, *_: Any) -> None:
        pass

    def say(self, status: int, content: bytes = b"", **headers: str) -> None:
        """A whole answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def cut(self, content: bytes, start: int, keep: int) -> None:
        """Announces all of it, sends a part, and hangs up."""
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for header, value in self.state.cut_headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content[start : start + keep])
        self.wfile.flush()
        self.close_connection = True

    def _answer(self, is_head: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        self.state.asked.append((self.command, name, self.headers.get("Range")))
        path = self.folder / name
        if not path.is_file():
            self.say(404, b"" if is_head else b"not here")
            return
        content = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.state.ranges else None
        if self.headers.get("If-Range") not in (None, self.state.headers.get(name, {}).get("ETag")):
            span = None
        start, end = 0, len(content)
        if span:
            start, end = int(span[1]), min(int(span[2] or len(content)) + 1, len(content)) if span[2] else len(content)
            if start >= len(content):
                self.say(416, Content_Range=f"bytes */{len(content)}")
                return
        if not is_head and any(fault(self, content, start) for fault in self.state.faults):
            return
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(end - start))
        if self.state.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        for header, value in self.state.headers.get(name, {}).items():
            self.send_header(header, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(content[start:end])


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serves a folder on loopback for the length of a block."""
    state = Server(url="")
    handler = type("Bound", (Handler,), {"state": state, "folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
