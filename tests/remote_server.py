"""A server of files with ranges, and with the faults that servers have; it counts what it serves."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Manners:
    """How the server answers.

    statuses    of the next answers for files that are there, one each     absent   status of what is not there
    drop_after  bytes of a body after which the connection is cut, `drops` times
    pause       seconds of silence before every body
    ranges      whether ranges are honoured        shift   answered range begins so many bytes too late
    short       bytes by which every body falls short of the range that its headers tell
    etag        of every file                      dated   whether Last-Modified is told
    forbidden   files that may not be read         token   what the query has to be
    """

    statuses: list[int] = field(default_factory=list)
    absent: int = 404
    drop_after: int = 0
    drops: int = 0
    pause: float = 0.0
    ranges: bool = True
    shift: int = 0
    short: int = 0
    etag: str = ""
    dated: bool = True
    forbidden: tuple[str, ...] = ()
    token: str = ""


@dataclass
class Request:
    """A request that is answered: path, status, and bytes of the body that were sent by now."""

    path: str
    status: int
    sent: int = 0


class Server(ThreadingHTTPServer):
    """Serves a folder; `requests` holds what was asked, and `manners` may be changed at any time."""

    daemon_threads = True

    def __init__(self, root: Path, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.root, self.manners, self.requests = root, Manners(), list[Request]()
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A client may go away when it has seen enough."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(one.sent for one in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    headers_of_refusals: tuple[tuple[str, str], ...] = ()
    server: Server

    def setup(self) -> None:
        """Let nothing be sent that nobody takes."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        super().setup()

    def do_GET(self) -> None:
        manners, asked = self.server.manners, urlsplit(self.path)
        file = self.server.root / unquote(asked.path).lstrip("/")
        if manners.token and asked.query != manners.token:
            return self.refuse(403)
        if asked.path.lstrip("/") in manners.forbidden:
            return self.refuse(403)
        if not file.is_file():
            return self.refuse(manners.absent)
        with self.server.lock:
            status = manners.statuses.pop(0) if manners.statuses else 0
        return self.refuse(status) if status else self.serve(file)

    def refuse(self, status: int) -> None:
        body = b"<html>nothing</html>"
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *self.headers_of_refusals):
            self.send_header(name, value)
        self.end_headers()
        self.note(status).sent = len(body)
        self.wfile.write(body)

    def serve(self, file: Path) -> None:
        manners, size = self.server.manners, file.stat().st_size
        told = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop, status = 0, size, 200
        if told and manners.ranges:
            start, stop, status = int(told[1]) + manners.shift, min(int(told[2]) + 1, size), 206
        with file.open("rb") as opened:
            opened.seek(start)
            body = opened.read(stop - start - manners.short)
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(body)))
        if manners.etag:
            self.send_header("ETag", manners.etag)
        if manners.dated:
            self.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
        self.end_headers()
        self.write(body, status)

    def write(self, body: bytes, status: int) -> None:
        manners = self.server.manners
        with self.server.lock:
            cut = manners.drops > 0 and len(body) > manners.drop_after
            manners.drops -= cut
        time.sleep(manners.pause)
        noted = self.note(status)
        try:
            for at in range(0, manners.drop_after if cut else len(body), 1 << 16):
                part = body[at : min(at + (1 << 16), manners.drop_after if cut else len(body))]
                noted.sent += len(part)
                self.wfile.write(part)
        except OSError:
            cut = True
        self.close_connection |= cut

    def note(self, status: int) -> Request:
        noted = Request(urlsplit(self.path).path, status)
        with self.server.lock:
            self.server.requests.append(noted)
        return noted

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(Handler):
    """As the hub answers for the models org/<folder> of which each has one commit."""

    headers_of_refusals = (("X-Error-Code", "RepoNotFound"),)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        told = re.fullmatch(r"/api/models/org/(\w+)(?:/(?:revision/(?P<at>[^/]+)|tree/(?P<tree>[^/]+)))?", path)
        file = re.fullmatch(rf"/org/(\w+)/resolve/{COMMIT}/(.+)", path)
        if (
            told
            and (self.server.root / told[1]).is_dir()
            and (told["at"] or told["tree"] or "main") in ("main", COMMIT)
        ):
            return self.answer(self.tree(told[1]) if told["tree"] else {"id": f"org/{told[1]}", "sha": COMMIT})
        self.path = f"/{file[1]}/{file[2]}" if file else "/nothing"
        return super().do_GET()

    def tree(self, folder: str) -> list[dict[str, object]]:
        files = sorted((self.server.root / folder).iterdir())
        return [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "0" * 40} for one in files]

    def answer(self, told: object) -> None:
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.note(200).sent = len(body)
        self.wfile.write(body)


@contextmanager
def serving(root: Path, handler: type[Handler] = Handler) -> Iterator[Server]:
    """Serve a folder from a thread."""
    with Server(root, handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
