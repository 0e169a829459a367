"""A small server that speaks the Hub's upload and download protocol, for huggingface_hub itself to talk to."""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 50_000  # bytes from which on a file goes through the large-file protocol


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Hub(ThreadingHTTPServer):
    """State: repositories (id → branch → path → bytes), large objects by SHA-256, and what to go wrong with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.failures: list[tuple[str, int, int]] = []  # (pattern, status, how often)
        self.corrupt = False
        self.token = "hf_right"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """As it was when it started, at the same address."""
        for kept in (self.repositories, self.objects, self.log, self.failures):
            kept.clear()
        self.corrupt = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        self.failures.append((pattern, status, times))

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[name][branch]


def environment(server, home, token="hf_right"):
    """Of a process that talks to the local Hub only, with a login of its own and nothing cached."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, value=None, status: int = 200, headers=(), content: bytes | None = None) -> None:
        body = content if content is not None else json.dumps({} if value is None else value).encode()
        self.send_response(status)
        for name, text in headers:
            self.send_header(name, text)
        if not any(name == "Content-Length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "") -> None:
        self.answer({"error": code}, status, [("X-Error-Code", code), ("X-Error-Message", code)])

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        line = f"{self.command} {path}"
        self.server.log.append(line)
        for index, (pattern, status, times) in enumerate(self.server.failures):
            if times and re.search(pattern, line):
                self.server.failures[index] = (pattern, status, times - 1)
                if status == 0:  # the connection is cut
                    self.connection.close()
                    self.close_connection = True
                else:
                    self.refuse(status)
                return
        writing = self.command == "POST" or "whoami" in path
        open_to_all = "paths-info" in path or "validate" in path
        login = self.headers.get("Authorization", "")
        if writing and not open_to_all and login != f"Bearer {self.server.token}":
            self.refuse(401)
            return
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, line):
                getattr(self, method)(body, **found.groupdict())
                return
        self.refuse(404, "EntryNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = do_any

    def whoami(self, _) -> None:
        self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def create(self, body) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, {"main": {}})
        self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name}, 409 if known else 200)

    def validate(self, _) -> None:
        self.answer({"errors": [], "warnings": []})

    def branch(self, _, name, branch) -> None:
        self.server.repositories[name].setdefault(branch, dict(self.server.files(name)))
        self.answer()

    def preupload(self, body, name, branch) -> None:
        files = json.loads(body)["files"]
        rows = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
            for f in files
        ]
        self.answer({"files": rows})

    def batch(self, body, name) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.objects:
                row["actions"] = {
                    "upload": {"href": f"{self.server.address}/store/{item['oid']}"},
                    "verify": {"href": f"{self.server.address}/verify"},
                }
            objects.append(row)
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body, oid) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer()

    def verify(self, _) -> None:
        self.answer()

    def commit(self, body, name, branch) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines()]
        request = "create_pr=1" in self.path
        tree = dict(self.server.files(name, branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                tree[value["path"]] = content[:-1] if self.server.corrupt else content
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.server.objects[value["oid"]]
        branch = "refs/pr/1" if request else branch
        self.server.repositories[name][branch] = tree
        answer = {"commitUrl": f"{self.server.address}/{name}/commit/{branch}", "commitOid": self._commit(branch)}
        if request:
            answer["pullRequestUrl"] = f"{self.server.address}/{name}/discussions/1"
        self.answer(answer)

    def _commit(self, branch) -> str:
        return hashlib.sha1(branch.encode(), usedforsecurity=False).hexdigest()

    def _tree(self, name, revision) -> dict[str, bytes]:
        for branch, tree in self.server.repositories.get(name, {}).items():
            if revision in (branch, branch.replace("/", "%2F"), self._commit(branch)):
                return tree
        return {}

    def _row(self, path, content) -> dict:
        row = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if len(content) >= LARGE:
            row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return row

    def paths_info(self, body, name, revision) -> None:
        from urllib.parse import parse_qs

        text = body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        tree = self._tree(name, revision)
        self.answer([self._row(path, tree[path]) for path in wanted if path in tree])

    def tree(self, _, name, revision) -> None:
        self.answer([self._row(path, content) for path, content in self._tree(name, revision).items()])

    def info(self, _, name, revision="main") -> None:
        if name not in self.server.repositories:
            self.refuse(404, "RepoNotFound")
            return
        rows = [{"rfilename": path} for path in self._tree(name, revision)]
        self.answer({"id": name, "modelId": name, "sha": self._commit(revision), "siblings": rows, "tags": []})

    def resolve(self, _, name, revision, path) -> None:
        tree = self._tree(name, revision)
        if path not in tree:
            self.refuse(404, "RepoNotFound" if name not in self.server.repositories else "EntryNotFound")
            return
        content = tree[path]
        commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else self._commit(revision)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            begin, end = int(wanted[1]), int(wanted[2]) + 1
            self.answer(status=416 if begin >= len(content) else 206, content=content[begin:end])
            return
        headers = [("ETag", f'"{hashlib.sha256(content).hexdigest()}"'), ("X-Repo-Commit", commit)]
        headers.append(("Content-Length", str(len(content))))
        self.answer(headers=headers, content=content)


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{NAME}/branch/(?P<branch>[^/]+)", "branch"),
    (rf"POST /api/models/{NAME}/preupload/(?P<branch>[^/]+)", "preupload"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /store/(?P<oid>\w+)", "store"),
    ("POST /verify", "verify"),
    (rf"POST /api/models/{NAME}/commit/(?P<branch>[^/]+)", "commit"),
    (rf"POST /api/models/{NAME}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"GET /api/models/{NAME}/tree/(?P<revision>[^/]+)", "tree"),
    (rf"GET /api/models/{NAME}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET /api/models/{NAME}", "info"),
    (r"(GET|HEAD) /(?P<name>datasets/[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    (rf"(GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
