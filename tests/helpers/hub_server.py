"""A hub on loopback that speaks the Hugging Face Hub's HTTP API to the real client, which finds it through HF_ENDPOINT.

Models and datasets by revision; gated ones, which 401 and 403 refuse; uploads by commits. What was asked for: `requests`.
"""

import base64
import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.helpers.judge_server import Answering, Loopback

TOKEN = "hf_" + "member0" * 5  # of the one account; it may read the gated repositories in `Hub.granted`


@dataclass
class Repository:
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by path, the newest commit last
    names: dict[str, str] = field(default_factory=dict)  # branches and tags

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Files are laid over those of the branch; returns the commit's id."""
        files = self.commits.get(self.names.get(branch, ""), {}) | files
        listing = [(path, digest(content)) for path, content in sorted(files.items())]
        commit = hashlib.sha1(repr((len(self.commits), listing)).encode()).hexdigest()
        self.commits[commit], self.names[branch] = files, commit
        return commit

    def find(self, revision: str) -> str | None:
        revision = self.names.get(revision, revision)
        return revision if revision in self.commits else None


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Hub(Loopback):
    def __init__(self):
        super().__init__(Handler)
        self.environment = {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        self.repositories: dict[tuple[str, str], Repository] = {}  # by ("models" or "datasets", id)
        self.granted: set[str] = set()
        self.requests: list[str] = []  # their paths

    def add(self, kind: str, name: str, folder: Path) -> str:
        repository = self.repositories.setdefault((kind, name), Repository())
        return repository.commit({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


class Handler(Answering):
    server: Hub

    def fail(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    method(self, **match.groupdict())
                return
        self.fail(404, "EntryNotFound", f"no such page: {path}")

    def repository(self, name: str, kind: str | None, files: bool = False) -> Repository | None:
        """None, after an answer, where there is none or the asker may not read its `files`."""
        found = self.server.repositories.get((kind or "models", name))
        member = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not member):
            self.fail(404 if member else 401, "RepoNotFound", "Repository not found")
        elif files and found.gated and not (member and name in self.server.granted):
            self.fail(403 if member else 401, "GatedRepo", f"Access to {kind or 'models'} {name} is restricted")
        else:
            return found
        return None

    def resolve(self, kind, name, revision, file) -> None:
        """A file of a revision, or its headers."""
        if (repository := self.repository(name, kind, files=True)) is None:
            return
        commit = repository.find(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"no revision {revision}")
        content = repository.commits[commit].get(file)
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{digest(content)}"'}
        return self.answer(200, content, **headers)

    def info(self, kind, name, revision="main") -> None:
        if (repository := self.repository(name, kind)) is None:
            return
        commit = repository.find(revision or "main")
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"no revision {revision}")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        traits = {"private": repository.private, "gated": "manual" if repository.gated else False, "tags": []}
        self.answer(200, {"id": name, "sha": commit, "siblings": siblings, **traits})

    def tree(self, kind, name, revision, folder="") -> None:
        if (repository := self.repository(name, kind, files=True)) is None:
            return
        files = repository.commits[repository.find(revision)]
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = [path for path in files if path.startswith(prefix)]
        if prefix and not inside:
            return self.fail(404, "EntryNotFound", f"no folder {folder}")
        self.answer(200, [entry(path, files[path]) for path in inside if "recursive" in self.path or "/" not in path])

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        key = (f"{asked.get('type', 'model')}s", name)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401, "", "Invalid credentials")
        url = f"{self.server.address}/{name}"
        if key in self.server.repositories:
            return self.answer(409, {"error": "You already created this repository", "url": url})
        self.server.repositories[key] = Repository(private=asked.get("visibility") == "private")
        self.server.repositories[key].commit({".gitattributes": b""})
        self.answer(200, {"url": url})

    def validate_card(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, kind, name, revision) -> None:
        modes = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(self.body)["files"]]
        self.answer(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def commit(self, kind, name, revision) -> None:
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.server.repositories[kind, name].commit(files, revision)
        url = f"{self.server.address}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


NAME, KIND = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<kind>models|datasets)"
ROUTES = {
    rf"/api/{KIND}/{NAME}(/revision/(?P<revision>.+))?": Handler.info,
    rf"/api/{KIND}/{NAME}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?": Handler.tree,
    rf"/api/{KIND}/{NAME}/preupload/(?P<revision>.+)": Handler.preupload,
    rf"/api/{KIND}/{NAME}/commit/(?P<revision>.+)": Handler.commit,
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate_card,
    rf"/((?P<kind>datasets)/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": Handler.resolve,
}
