"""A server on this machine that truncates, stalls, redirects, refuses ranges and serves wrong bytes, as told."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BODY = bytes(range(256)) * 5000
SHA256 = "sha256:" + hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `body` at every path; `behave` says what goes wrong, `ranges` what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.ranges_allowed = BODY, '"one"', True
        self.send_length = True
        self.pages: list[str] = []
        self.cuts: list[int] = []
        self.stalls = 0
        self.statuses: list[int] = []
        self.requests: list[tuple[str, str | None]] = []
        self.release = threading.Event()

    def url(self, path: str = "pack.bin") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/pack.bin")
            self.end_headers()
            return
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if server.pages:
            self.send_response(200)
            self.send_header("Content-Type", server.pages.pop(0))
            self.end_headers()
            self.wfile.write(b"<html>Please sign in to this network.</html>")
            return
        start = 0
        if asked and server.ranges_allowed and self.headers.get("If-Range") in (None, server.etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        if server.send_length:
            self.send_header("Content-Length", str(len(server.body) - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        data = server.body[start:]
        if server.cuts:
            data = data[: server.cuts.pop(0)]
            if server.stalls:
                server.stalls -= 1
                self.wfile.write(data)
                server.release.wait(5)
                return
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass
