"""A stand-in of the Hugging Face hub: a folder of repositories served by the addresses that its libraries call.

`root/models/<id>/…` and `root/datasets/<id>/…` hold the files of the one branch, `main`. Whatever else is asked for
(and any repository that is not there) is answered as the hub does, with its status and error code. A repository with a
file `PRIVATE` is there for `TOKEN` only, of one with a file `GATED` nobody gets a file.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in"

_ID = r"((?:[^/]+/)?[^/]+)"
_API = re.compile(rf"/api/(models|datasets)/{_ID}(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(rf"/(?:(datasets)/)?{_ID}/resolve/([^/]+)/(.+)")


def _oid(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer()

    def _send(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, what: str, code: int = 404) -> None:
        self._send(code, b"{}", X_Error_Code=what, X_Error_Message=what)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {self.path}")
        api, resolve = _API.fullmatch(path), _RESOLVE.fullmatch(path)
        if not api and not resolve:
            return self._refuse("EntryNotFound")
        kind, name = api.group(1, 2) if api else (resolve[1] or "models", resolve[2])
        repo = self.server.root / kind / name
        secret = (repo / "PRIVATE").exists() and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if secret or not repo.is_dir():
            return self._refuse("RepoNotFound")
        revision = (api[4] if api else resolve[3]) or "main"
        commit = self.server.commit(repo)
        if revision not in ("main", commit):
            return self._refuse("RevisionNotFound")
        if resolve and (repo / "GATED").exists():
            return self._refuse("GatedRepo", 403)
        if resolve:
            return self._file(repo / resolve[4], commit)
        content = self._tree(repo, api[5] or "") if api[3] in ("tree", "paths-info") else self._info(repo, name, commit)
        if content is None:
            return self._refuse("EntryNotFound")
        self._send(200, json.dumps(content).encode(), Content_Type="application/json")

    def _info(self, repo: Path, name: str, commit: str) -> dict[str, object]:
        files = [{"rfilename": str(file.relative_to(repo))} for file in self.server.files(repo)]
        return {"id": name, "sha": commit, "private": False, "gated": False, "tags": [], "siblings": files}

    def _tree(self, repo: Path, under: str) -> list[dict[str, object]] | None:
        """Files (and folders) as `tree` lists them, or those asked for by `paths-info`."""
        known = {str(file.relative_to(repo)): file for file in sorted(repo.rglob("*"))}
        if self.command == "POST":
            body = json.loads(self.body) if self.body.startswith("{") else parse_qs(self.body)
            wanted = [path for path in body["paths"] if path in known]
        else:
            if under and not (repo / under).is_dir():
                return None
            deep = "true" in parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower()
            inside = [path for path in known if not under or path.startswith(f"{under}/")]
            wanted = [path for path in inside if deep or "/" not in path[len(under) :].lstrip("/")]
        return [
            {"type": "file", "path": path, "size": known[path].stat().st_size, "oid": _oid(known[path])}
            if known[path].is_file()
            else {"type": "directory", "path": path, "oid": "0" * 40}
            for path in wanted
        ]

    def _file(self, file: Path, commit: str) -> None:
        if not file.is_file():
            return self._refuse("EntryNotFound")
        content = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{_oid(file)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if span:
            first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], **headers)
        self._send(200, content, **headers)


class Hub(ThreadingHTTPServer):
    """The server; `requests` are those it was asked, in order."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: Path) -> list[Path]:
        return [file for file in sorted(repo.rglob("*")) if file.is_file()]

    def commit(self, repo: Path) -> str:
        listed = "".join(f"{file.relative_to(repo)} {_oid(file)}\n" for file in self.files(repo))
        return hashlib.sha1(listed.encode()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Serves the repositories in `root` until the block ends."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
