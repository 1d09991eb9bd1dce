"""A stand-in for the Hub: the part of its HTTP interface that huggingface_hub uses to fetch files and to make a commit.

Repositories, their commits and the store of large files are plain dictionaries, to be looked at and broken by tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"


@dataclass
class Repo:
    """Every commit has all of its files; `main` is the last one."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, {**(self.commits[-1][1] if self.commits else {}), **files}))
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        wanted = self.tags.get(revision, revision)
        return next((c for c in self.commits if c[0] == wanted), None)


@dataclass
class Reply:
    """`dies_after` so many bytes of its body, the connection is closed."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    dies_after: int | None = None


def saying(found: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(status, json.dumps(found).encode(), {"Content-Type": "application/json", **headers})


def refusing(status: int, code: str = "", message: str = "") -> Reply:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return saying({"error": message}, status, **{k: v for k, v in headers.items() if v})


class Hub:
    """`asked` lists the requests, `METHOD /path`. `stops` may answer one, which is then not carried out; `breaks` may
    change the answer to one that was.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.mend()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def mend(self) -> None:
        self.stops: Callable[[str], Reply | None] = lambda request: None
        self.breaks: Callable[[str, Reply], Reply | None] = lambda request, reply: None

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def make(self, name: str, files: dict[str, bytes], **kwargs: Any) -> Repo:
        repo = self.repos[name] = Repo(**kwargs)
        repo.commit(files)
        return repo

    # -- what is answered ------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, body: bytes, headers: Any) -> Reply:
        known = headers.get("Authorization") == f"Bearer {TOKEN}"
        for pattern, reply in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda known, body: saying({"errors": [], "warnings": []})),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", self._info),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self._tree),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main", self._commit),
            (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/large/verify", lambda known, body: saying({})),
            (r"/large/(?P<oid>[0-9a-f]{64})", self._large),
            (r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, urlsplit(path).path):
                found = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                repo = self.repos.get(found["repo"]) if "repo" in found else None
                if "repo" in found and (repo is None or (repo.private and not known)):
                    return refusing(404 if known else 401, "RepoNotFound", "Repository not found")
                if method in ("POST", "PUT") and not known and "validate" not in path and "/large/" not in path:
                    return refusing(401, message="Invalid username or password.")
                return reply(known, body, **found)
        return refusing(404, message=f"the stand-in knows no {method} {path}")

    def _create(self, known: bool, body: bytes) -> Reply:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "alice":
            return refusing(403, message="You don't have the rights to create a model under this namespace")
        if name in self.repos:
            return saying({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.make(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return saying({"url": f"{self.url}/{name}"})

    def _info(self, known: bool, body: bytes, repo: str, revision: str = "main") -> Reply:
        found = self.repos[repo].at(revision)
        if found is None:
            return refusing(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [{"rfilename": f} for f in found[1]]
        private = self.repos[repo].private
        return saying({"id": repo, "sha": found[0], "private": private, "tags": [], "siblings": files})

    def _tree(self, known: bool, body: bytes, repo: str, revision: str) -> Reply:
        found = self.repos[repo].at(revision)
        if found is None:
            return refusing(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return saying([{"type": "file", "path": f, "size": len(b), "oid": _blob(b)} for f, b in found[1].items()])

    def _preupload(self, known: bool, body: bytes, repo: str) -> Reply:
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            there = self.repos[repo].files.get(path)
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = None if there is None else hashlib.sha256(there).hexdigest() if mode == "lfs" else _blob(there)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return saying({"files": files})

    def _batch(self, known: bool, body: bytes, repo: str) -> Reply:
        objects = []
        for asked in json.loads(body)["objects"]:
            put, verify = f"{self.url}/large/{asked['oid']}", f"{self.url}/large/verify"
            actions = {"upload": {"href": put, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append({**asked, **({} if asked["oid"] in self.large else {"actions": actions})})
        return saying({"transfer": "basic", "objects": objects})

    def _large(self, known: bool, body: bytes, oid: str) -> Reply:
        if not body:
            return Reply(body=self.large[oid], headers={"ETag": f'"{oid}"'})
        if hashlib.sha256(body).hexdigest() != oid:
            return refusing(400, message="the content is not what its name says")
        self.large[oid] = body
        return Reply()

    def _commit(self, known: bool, body: bytes, repo: str) -> Reply:
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        sha = self.repos[repo].commit(files)
        return saying({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"})

    def _resolve(self, known: bool, body: bytes, repo: str, revision: str, file: str) -> Reply:
        there = self.repos[repo]
        if there.gated and not known:
            return refusing(401, "GatedRepo", f"Access to model {repo} is restricted.")
        found = there.at(revision)
        if found is None:
            return refusing(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = found
        if file not in files:
            reply = refusing(404, "EntryNotFound", "Entry not found")
            return Reply(reply.status, reply.body, {**reply.headers, "X-Repo-Commit": sha})
        content = files[file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_blob(content)}"'}
        if file.endswith(".safetensors"):  # these are redirected to another host, which has its own headers
            oid = hashlib.sha256(content).hexdigest()
            self.large[oid] = content
            elsewhere = self.url.replace("127.0.0.1", "localhost")
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return Reply(302, b"", {**headers, "Location": f"{elsewhere}/large/{oid}"})
        return Reply(200, content, headers)


def _rest(whole: Reply, start: int) -> Reply:
    size = len(whole.body)
    if start >= size:
        return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
    return Reply(206, whole.body[start:], {**whole.headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"})


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: nobody waits for an acknowledgement in between

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {self.path}"
            hub.asked.append(request)
            answer = hub.stops(request) or hub.answer(self.command, self.path, body, self.headers)
            if (wanted := self.headers.get("Range")) and answer.status == 200 and self.command == "GET":
                answer = _rest(answer, int(wanted.removeprefix("bytes=").partition("-")[0]))
            answer = hub.breaks(request, answer) or answer
            try:
                self.send_response(answer.status)
                for key, value in answer.headers.items():
                    self.send_header(key, value)
                if "Content-Length" not in answer.headers:
                    self.send_header("Content-Length", str(len(answer.body)))
                if answer.dies_after is not None:  # or the next request may be sent into the closed connection
                    self.send_header("Connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.dies_after])
            except ConnectionError:
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = reply

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
