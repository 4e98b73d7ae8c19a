"""A stand-in for the hub that takes uploads: what huggingface_hub asks for when it makes a commit without Xet.

Names, fields and status codes are those that huggingface_hub reads. The real hub checks more than this.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.models.teacher.small_hub import Hub, Repository

TOKENS = {"hf_owner": ("me", "write"), "hf_reader": ("me", "read"), "hf_other": ("you", "write")}
"""User and role of each token that is accepted."""
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(kw_only=True)
class Uploads:
    """What happened: requests that change something, by kind, and large files that arrived, by sha256.

    before: called with the kind of each such request; False: it is not answered, as if it had not arrived.
    """

    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    before: Callable[[str], bool] = lambda kind: True


def repository(files: dict[str, bytes], *, private: bool = True) -> Repository:
    """A repository with these files."""
    made = Repository(private=private, large=(".safetensors", ".png", "tokenizer.json"))
    made.files, made.commit = dict(files), _digest(files)
    return made


class UploadHub(Hub):
    """Serves `repositories` as Hub does, to the owner of a private one, and takes uploads."""

    uploads: Uploads

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self.answer_json({"name": self.user[0], "auth": {"accessToken": {"role": self.user[1]}}})
        name = re.match(r"(?:/api/models)?/(\w+/\w+)", path)[1]
        if self.hidden(name):
            return self.refuse(401, "RepoNotFound")
        if name == "someone/gated":
            return self.refuse(403, "GatedRepo")
        if path == f"/api/models/{name}":
            repository = self.repositories[name]
            names = [{"rfilename": name} for name in repository.files]
            shown = {"id": name, "sha": repository.commit, "private": repository.private, "siblings": names}
            return self.answer_json(shown)
        return super().do_GET()

    def do_HEAD(self):
        name = re.match(r"/(\w+/\w+)", self.path)[1]
        return self.refuse(401, "RepoNotFound") if self.hidden(name) else super().do_HEAD()

    @property
    def user(self) -> tuple[str, str] | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def hidden(self, name: str) -> bool:
        found = self.repositories.get(name)
        owner = self.user is not None and self.user[0] == name.split("/")[0]
        return name != "someone/gated" and (found is None or (found.private and not owner))

    def parse_request(self):
        """Refuse an unknown token before anything else."""
        if not super().parse_request():
            return False
        if "Authorization" in self.headers and self.user is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return False
        return True

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for pattern, kind in (
            ("/api/validate-yaml", "validate"),
            ("/api/repos/create", "create"),
            (r"/api/models/(\w+/\w+)/preupload/main", "preupload"),
            (r"/(\w+/\w+)\.git/info/lfs/objects/batch", "batch"),
            (r"/api/models/(\w+/\w+)/commit/main", "commit"),
            (r"/api/models/(\w+/\w+)/paths-info/\w+", "paths"),
        ):
            if match := re.fullmatch(pattern, self.path.split("?")[0]):
                return getattr(self, kind)(data, *match.groups())
        return self.refuse(404, "")

    def do_PUT(self):
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/settings", self.path):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.uploads.requests.append("settings")
            self.repositories[match[1]].private = is_private(asked)
            return self.answer_json({})
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.arrives("put"):
            return None
        sha256 = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != sha256:
            return self.refuse(400, "")
        self.uploads.objects[sha256] = data
        return self.answer_json({})

    def arrives(self, kind: str) -> bool:
        if not self.uploads.before(kind):
            self.close_connection = True
            return False
        self.uploads.requests.append(kind)
        return True

    def validate(self, data: bytes) -> None:
        card = json.loads(data)["content"]
        metadata = yaml.safe_load(card.split("---\n")[1])
        wrong = not re.fullmatch(r"[\w.-]+/[\w.-]+", metadata.get("base_model", "a/b"))
        wrong |= metadata.get("license") == "other" and "license_name" not in metadata
        errors = [{"message": "metadata"}] if wrong else []
        self.answer_json({"errors": errors, "warnings": []}, status=400 if wrong else 200)

    def create(self, data: bytes) -> None:
        self.uploads.requests.append("create")
        asked = json.loads(data)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.user[0]:
            return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.repositories:
            return self.refuse(409, "")
        self.repositories[name] = repository({".gitattributes": ATTRIBUTES}, private=is_private(asked))
        return self.answer_json({"url": f"http://{self.headers['Host']}/{name}"})

    def preupload(self, data: bytes, name: str) -> None:
        if self.user is None or self.user[0] != name.split("/")[0]:
            return self.refuse(403, "", "no write permission")
        hub = self.repositories[name]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(hub.large) else "regular",
                "shouldIgnore": False,
                "oid": self.oid(hub, file["path"]),
            }
            for file in json.loads(data)["files"]
        ]
        return self.answer_json({"files": modes})

    def oid(self, hub: Repository, name: str) -> str | None:
        """As git names contents: huggingface_hub leaves out what is the same."""
        if name not in hub.files:
            return None
        content = hub.files[name]
        if name.endswith(hub.large):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def batch(self, data: bytes, name: str) -> None:
        objects = []
        for large in json.loads(data)["objects"]:
            upload = {"upload": {"href": f"http://{self.headers['Host']}/objects/{large['oid']}"}}
            objects.append(large if large["oid"] in self.uploads.objects else large | {"actions": upload})
        self.answer_json({"transfer": "basic", "objects": objects})

    def commit(self, data: bytes, name: str) -> None:
        if not self.arrives("commit"):
            return None
        hub = self.repositories[name]
        files = dict(hub.files)
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", hub.commit) != hub.commit:
                return self.refuse(412, "")
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                files[value["path"]] = self.uploads.objects[value["oid"]]
            if entry["key"] == "deletedFile":
                del files[value["path"]]
        hub.files, hub.commit = files, _digest(files)
        url = f"http://{self.headers['Host']}/{name}/commit/{hub.commit}"
        return self.answer_json({"commitUrl": url, "commitOid": hub.commit})

    def paths(self, data: bytes, name: str) -> None:
        self.give(self.repositories[name].entries(self.repositories[name].files), body=True)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.give(json.dumps(value).encode(), body=True, status=status)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def is_private(asked: dict[str, Any]) -> bool:
    """Newer versions send visibility."""
    return asked.get("visibility") == "private" or asked.get("private", False)


def _digest(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
