"""
A Hub on loopback: as much of its interface as downloads, uploads and `from_pretrained` use. `HF_ENDPOINT` is read when
`huggingface_hub` is imported, so what asks it is a process of its own.
"""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Hub:
    """
    repositories: name → path → content.
    gated, private: names that want `TOKEN`.
    requests: methods and paths, in the order that they came.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.objects: dict[str, bytes] = {}  # by sha256: uploaded, but in no commit yet
        self.requests: list[tuple[str, str]] = []
        self.address = ""

    def add(self, name: str, folder: Path) -> None:
        """A repository with the files of a folder."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def commit(self, name: str) -> str:
        """The hash of what it has."""
        digest = hashlib.sha1()
        for path, content in sorted(self.repositories[name].items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()

    def environment(self, cache: Path, token: str | None = TOKEN, **others: str) -> dict[str, str]:
        """Of a process that asks this Hub, and no other; what it downloads is kept in `cache`."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return inherited | own | ({} if token is None else {"HF_TOKEN": token}) | others


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub`, at its address until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers for the `hub` of a subclass."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        self.hub.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(unquote(urlsplit(self.path).path).strip("/").split("/"), body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def send(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        is_json = not isinstance(content, bytes)
        content = json.dumps(content).encode() if is_json else content
        self.send_response(status)
        headers = {"Content-Type": "application/json" if is_json else "application/octet-stream", **headers}
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str, status: int = 404) -> None:
        self.send({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, path: list[str], body: bytes) -> None:
        match path:
            case ["api", "whoami-v2"]:
                self.send({"name": "someone", "type": "user"}) if self.is_known() else self.refuse("", 401)
            case ["api", "validate-yaml"]:
                self.send({"errors": [], "warnings": []})
            case ["api", "repos", "create"] if self.is_known():
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
                self.hub.repositories.setdefault(name, {})
                self.send({"url": f"{self.hub.address}/{name}", "id": name, "name": name})
            case ["api", "models", owner, name, *rest]:
                self.of_repository(f"{owner}/{name}", rest, body)
            case ["objects", sha256] if self.command == "PUT":
                self.hub.objects[sha256] = body
                self.send({})
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git") and self.is_known():
                objects = [self.upload(each) for each in json.loads(body)["objects"]]
                self.send({"transfer": "basic", "objects": objects})
            case [owner, name, "resolve", revision, *file]:
                self.file(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self.refuse("RepoNotFound")

    def upload(self, asked: dict) -> dict:
        """Where a large file goes."""
        return {**asked, "actions": {"upload": {"href": f"{self.hub.address}/objects/{asked['oid']}"}}}

    def is_refused(self, name: str, revision: str = "main") -> bool:
        if name not in self.hub.repositories:
            self.refuse("RepoNotFound")
        elif name in self.hub.gated and not self.is_known():
            self.refuse("GatedRepo", 403)
        elif revision not in ("main", self.hub.commit(name)):
            self.refuse("RevisionNotFound")
        else:
            return False
        return True

    def of_repository(self, name: str, rest: list[str], body: bytes) -> None:
        match rest:
            case [] | ["revision", _]:
                if not self.is_refused(name, rest[1] if rest else "main"):
                    files = [{"rfilename": path} for path in self.hub.repositories[name]]
                    self.send({"id": name, "sha": self.hub.commit(name), "siblings": files})
            case ["tree", revision, *folder]:
                if not self.is_refused(name, revision):
                    inside = "".join(f"{each}/" for each in folder)
                    found = [
                        {
                            "type": "file",
                            "path": path,
                            "size": len(content),
                            "oid": digest_of(content),
                        }
                        for path, content in self.hub.repositories[name].items()
                        if path.startswith(inside)
                    ]
                    self.send(found) if found else self.refuse("EntryNotFound")
            case ["preupload", "main"] if self.is_known():
                files = [
                    {"path": each["path"], "uploadMode": mode_of(each["path"]), "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                self.send({"files": files})
            case ["commit", "main"] if self.is_known():
                for line in body.splitlines():
                    each = json.loads(line)
                    value = each["value"]
                    if each["key"] == "file":
                        self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                    elif each["key"] == "lfsFile":
                        self.hub.repositories[name][value["path"]] = self.hub.objects[value["oid"]]
                commit = self.hub.commit(name)
                self.send({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})
            case _:
                self.refuse("EntryNotFound")

    def file(self, name: str, revision: str, path: str) -> None:
        if self.is_refused(name, revision):
            return
        if path not in self.hub.repositories[name]:
            return self.refuse("EntryNotFound")
        content, commit = self.hub.repositories[name][path], self.hub.commit(name)
        self.send(content, ETag=f'"{digest_of(content)}"', X_Repo_Commit=commit)


def digest_of(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def mode_of(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
