"""A Hugging Face hub on the loopback interface, as far as `huggingface_hub` needs it, and a client in its own process.

Models are repositories by their names; a dataset's key has `datasets/` before the name. Datasets are read only.

The client is a fresh process because `huggingface_hub` reads its environment variables, `HF_ENDPOINT` first, when it is
imported: nothing of it is patched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_ada"
USER = "ada"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits are whole trees, path -> content; a large file's content is in `FakeHub.large` too."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, changes: dict[str, bytes]) -> str:
        parent = self.refs.get(ref)
        tree = self.commits.get(parent, {}) | changes
        sha = hashlib.sha1(repr((parent, sorted(tree.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """The server. `log` has (method, path) of every request; `repos` may be looked at and written to."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.agents: set[str] = set()
        self.failing: int | None = None  # answer everything with this status
        self.connections: list[socket.socket] = []
        self.address = ("127.0.0.1", 0)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def start(self) -> None:
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(self.address, handler)
        self._server.daemon_threads = True
        self.address = self._server.server_address
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:  # those kept alive too
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed by the client
                pass
        self.connections.clear()

    def put(self, name: str, files: dict[str, bytes], ref: str = "main", **flags) -> str:
        """Files by the back door; returns the commit."""
        repo = self.repos.setdefault(name, Repo(**flags))
        for path, data in files.items():
            if path.endswith(".safetensors"):
                self.large[hashlib.sha256(data).hexdigest()] = data
        return repo.commit(ref, files)

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        return self.repos[name].commits[self.repos[name].refs[ref]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *args):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        if self.hub.failing:
            return self.answer(self.hub.failing, {"error": "not today"})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if parts[:1] == ["large"]:
            return self.large(parts[1], body)
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self.model("/".join(parts[2:4]), parts[4:], body)
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            return self.tree("/".join(parts[1:4]), parts[4:], body)
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        owner = 3 if parts[0] == "datasets" else 2
        if len(parts) > owner + 2 and parts[owner] == "resolve":
            return self.resolve("/".join(parts[:owner]), parts[owner + 1 :])
        self.answer(404, {"error": f"no route {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status: int, content: dict | list | bytes = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self, wanted: dict) -> None:
        if not self.known:
            return self.answer(401, {"error": "Invalid username or password."})
        owner = wanted.get("organization") or USER
        if owner != USER:
            return self.answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        name = f"{owner}/{wanted['name']}"
        address = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.answer(409, address | {"error": "You already created this model repo"})
        self.hub.put(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=wanted.get("visibility") == "private"
        )
        self.answer(200, address)

    def validate(self, wanted: dict) -> None:
        try:
            head = wanted["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(head), dict)
        except Exception as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        self.answer(200, {"errors": [], "warnings": []})

    def large(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.large[oid] = body
            return self.answer(200)
        assert "Authorization" not in self.headers
        self.answer(200, self.hub.large[oid], ETag=f'"{oid}"')

    def batch(self, wanted: dict) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}} for one in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def repo(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and a commit of it, or None after the answer that the hub gives."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            code = {"X_Error_Code": "RepoNotFound"} if self.known else {}
            self.answer(404 if self.known else 401, {"error": "Repository not found"}, **code)
        elif repo.gated:
            self.answer(403, {"error": "restricted"}, X_Error_Code="GatedRepo")
        elif (commit := repo.find(revision)) is None:
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return repo, commit
        return None

    def model(self, name: str, rest: list[str], body: bytes) -> None:
        action, revision = rest[0] if rest else "revision", "/".join(rest[1:]) or "main"
        if action in ("revision", "tree", "paths-info"):
            return self.tree(name, rest, body)
        if (found := self.repo(name, "main" if action == "branch" else revision)) is None:
            return None
        repo, commit = found
        if not self.known:
            return self.answer(401, {"error": "Invalid username or password."})
        if action == "branch":
            if revision in repo.refs:
                return self.answer(409, {"error": "Reference already exists"})
            repo.refs[revision] = commit
            return self.answer(200, {})
        if action == "preupload":
            tree = repo.commits[commit]
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": git_oid(tree[file["path"]]) if file["path"] in tree else None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        changes = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
        request = "create_pr=1" in urlsplit(self.path).query
        if request:
            repo.refs["refs/pr/1"] = commit
        sha = repo.commit("refs/pr/1" if request else revision, changes)
        done = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}
        self.answer(200, done | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if request else {}))

    def tree(self, name: str, rest: list[str], body: bytes) -> None:
        """The commit of a revision with its files; or those under a path, or of those names, with their sizes."""
        action, *place = rest or ["revision"]
        if action not in ("revision", "tree", "paths-info"):
            return self.answer(404, {"error": f"no route {self.path}"})
        cut = len(place) if action == "revision" else 3 if place[0] == "refs" else 1
        if (found := self.repo(name, "/".join(place[:cut]) or "main")) is None:
            return
        files, under = found[0].commits[found[1]], "".join(f"{part}/" for part in place[cut:])
        if action == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            name = name.removeprefix("datasets/")
            return self.answer(200, {"id": name, "sha": found[1], "siblings": siblings, "tags": []})
        wanted = parse_qs(body.decode()).get("paths", []) if action == "paths-info" else files
        deep = action == "paths-info" or "recursive=true" in urlsplit(self.path).query.lower()
        listed = sorted(path for path in files if path in wanted and path.startswith(under))
        folders = {str(folder) for path in listed for folder in PurePosixPath(path[len(under) :]).parents} - {"."}
        entries = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": git_oid(files[path])}
            for path in listed
            if deep or "/" not in path[len(under) :]
        ]
        entries += [
            {"type": "directory", "path": under + folder, "oid": git_oid(b"")}
            for folder in sorted(folders)
            if deep or "/" not in folder
        ]
        if under and not entries:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        self.answer(200, entries)

    def resolve(self, name: str, rest: list[str]) -> None:
        owner = self.hub.repos.get(name, Repo())
        cut = 3 if rest[0] == "refs" else 1
        revision, path = "/".join(rest[:cut]), "/".join(rest[cut:])
        if owner.find(revision) is None and owner.find("/".join(rest[:2])):
            revision, path = "/".join(rest[:2]), "/".join(rest[2:])
        if (found := self.repo(name, revision)) is None:
            return None
        repo, commit = found
        if path not in repo.commits[commit]:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = repo.commits[commit][path]
        if path.endswith(".safetensors"):
            oid = hashlib.sha256(data).hexdigest()
            linked = {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": str(len(data)), "X_Repo_Commit": commit}
            # Another host name, as the hub's: the client must not send it the token.
            return self.answer(302, Location=f"http://localhost:{self.hub.address[1]}/large/{oid}", **linked)
        self.answer(200, data, ETag=f'"{git_oid(data)}"', X_Repo_Commit=commit)


# ---------------------------------------------------------------------------------------------------- client side
class Client:
    """A process that imports `huggingface_hub` under an environment of its own; `client(function, ...)` runs there."""

    def __init__(self, **environment: str):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        # hf_xet is a program that speaks to servers of its own; without it large files go by plain HTTP.
        environment = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"} | environment
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        with mock.patch.dict(os.environ, kept | environment, clear=True):
            self._process.start()
        other.close()

    def __call__(self, function, *given, **options):
        self._pipe.send((function, given, options))
        result, error = self._pipe.recv()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def serve(pipe) -> None:
    """The client's process: calls in, results or exceptions out."""
    while True:
        function, given, options = pipe.recv()
        try:
            answer = function(*given, **options), None
        except Exception as error:
            answer = None, error
        pipe.send(answer)


def load(name: str, **options) -> dict:
    """What `PrunerConfig.from_pretrained` finds, as a dictionary."""
    from prune import PrunerConfig

    return PrunerConfig.from_pretrained(name, **options).to_dict()


def push(config: dict, repo: str, **options) -> str:
    from prune import PrunerConfig

    return PrunerConfig.from_dict(config).push_to_hub(repo, **options)


def outcome(method: str, given: dict) -> tuple:
    """Logits and kept indices of a small LLaVA under a pruner."""
    import torch
    from tiny import collate, one, shared

    from prune import apply_pruner

    model = shared("llava")
    with torch.no_grad(), apply_pruner(model, method, **given) as handle:
        logits = model(**collate(one("llava"))).logits.tolist()
        return logits, [image.kept.tolist() for image in handle.last.images], handle.budget


def push_handle(repo: str, method: str, given: dict, **options) -> str:
    """Attach, push, remove."""
    from tiny import shared

    from prune import apply_pruner

    with apply_pruner(shared("llava"), method, **given) as handle:
        return handle.push_to_hub(repo, **options)


def save_and_push(folder: str, method: str, given: dict, **options) -> str:
    from tiny import shared

    from prune import apply_pruner

    with apply_pruner(shared("llava"), method, **given) as handle:
        return str(handle.save_pretrained(folder, push_to_hub=True, **options))


def refusal(method: str, without_sleep: bool = False, **options) -> tuple[str, str, bool]:
    """The kind and text of the error that attaching raises, and whether it left the model as it was."""
    from fingerprint import changed, fingerprint
    from tiny import shared

    from prune import PruneError, apply_pruner

    model = shared("llava")
    before = fingerprint(model)
    with mock.patch("time.sleep") if without_sleep else mock.patch.dict({}):
        try:
            apply_pruner(model, method, **options).remove()
        except PruneError as error:
            return type(error).__name__, str(error), not changed(before, fingerprint(model))
    return "", "", True


def weights(name: str, **options) -> dict[str, list]:
    """The weights of a saved `index_preserving`'s classifier."""
    from prune import PrunerConfig

    module = PrunerConfig.from_pretrained(name, **options).build()._module
    return {key: value.tolist() for key, value in module.state_dict().items()}
