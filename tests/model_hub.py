"""A model hub on loopback: the part of the hub's protocol that huggingface_hub needs to list and fetch files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each a folder; requests that were answered; and repositories that ask for terms."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.url = ""

    def add(self, repo: str, **files: bytes | Path) -> None:
        """Put files into a repository, by names with `__` for `/`."""
        for name, content in files.items():
            target = self.folder / repo / name.replace("__", "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read_bytes() if isinstance(content, Path) else content)

    def fetched(self) -> list[str]:
        """Files whose content was sent."""
        return [path.split("/resolve/main/")[1] for path in self.requests if "/resolve/main/" in path]

    @contextmanager
    def serve(self) -> Iterator[None]:
        """Context manager: answer on a port of this machine."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        folder = self.hub.folder / repo
        if not folder.is_dir():
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        if repo in self.hub.gated:
            return self.send(403, {"X-Error-Code": "GatedRepo"})
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        if api and "tree" in parts:
            tree = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names]
            return self.send(200, {}, json.dumps(tree).encode(), body)
        if api:
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, {}, json.dumps(info).encode(), body)
        file = folder / "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or not file.is_file():
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        if body:
            self.hub.requests.append(path)
        etag = hashlib.sha256(content).hexdigest()
        return self.send(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content, body)

    def send(self, status: int, headers: dict[str, str], content: bytes = b"", body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
