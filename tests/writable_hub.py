"""A hub that can be written to: repositories are made, files uploaded as LFS objects, and commits made of them."""

import asyncio
import base64
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.hub import Hub, Refused, Repository


@dataclass
class WritableHub(Hub):
    """`folder` keeps what is written; `write_token` may write, and to `namespace` alone."""

    folder: Path = Path()
    write_token: str = "hf_writing_secret_of_the_tests"
    namespace: str = "acme"
    objects: dict[str, bytes] = field(default_factory=dict)
    log: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    """Commits of each repository, newest first: id, title, message."""
    uploads: int = 0
    fails: int = 0
    """Number of further commits that are answered by 503."""

    commit_takes_s: float = 0.0

    def routes(self) -> list[Route]:
        api = "/api/models/{org}/{name}"
        return [
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", self._valid, methods=["POST"]),
            Route(api + "/preupload/{revision}", self._preupload, methods=["POST"]),
            Route(api + "/commit/{revision}", self._commit, methods=["POST"]),
            Route(api + "/commits/{revision}", self._commits),
            Route("/{org}/{name}/info/lfs/objects/batch", self._batch, methods=["POST"]),
            Route("/lfs/{oid}", self._upload, methods=["PUT"]),
            *super().routes(),
        ]

    @property
    def tokens(self) -> tuple[str, ...]:
        return (self.token, self.write_token)

    def written(self, name: str) -> Path:
        """Return the folder of a repository's newest commit."""
        repository = self.repositories["model", name]
        return repository.commits[repository.newest]

    def _writable(self, request: Request, organization: str) -> None:
        self.requests.append(f"{request.method} {request.url.path}")
        if self.is_down:
            raise Refused(503, "")
        if request.headers.get("authorization") != f"Bearer {self.write_token}" or organization != self.namespace:
            raise Refused(403, "")

    async def _create(self, request: Request) -> Response:
        asked = await request.json()
        organization, name = asked["organization"], f"{asked['organization']}/{asked['name']}"
        self._writable(request, organization)
        if ("model", name) in self.repositories:
            return JSONResponse({"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}, 409)
        empty = self.folder / name / "0"
        empty.mkdir(parents=True)
        (empty / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        is_private = asked.get("private", asked.get("visibility") == "private")
        self.repositories["model", name] = repository = Repository("model", name, bool(is_private))
        self.log[name] = [(repository.push(empty), "initial commit", "")]
        return JSONResponse({"url": f"{self.endpoint}/{name}", "name": name})

    async def _valid(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        self._writable(request, request.path_params["org"])
        files = (await request.json())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        return JSONResponse({"files": modes})

    async def _batch(self, request: Request) -> Response:
        self._writable(request, request.path_params["org"])
        asked = (await request.json())["objects"]
        there = [{**o, "actions": self._actions(o["oid"])} if o["oid"] not in self.objects else o for o in asked]
        return JSONResponse({"transfer": "basic", "objects": there})

    def _actions(self, oid: str) -> dict[str, dict[str, str]]:
        return {"upload": {"href": f"{self.endpoint}/lfs/{oid}"}}

    async def _upload(self, request: Request) -> Response:
        content, oid = await request.body(), request.path_params["oid"]
        assert hashlib.sha256(content).hexdigest() == oid
        self.objects[oid] = content
        self.uploads += 1
        return Response()

    async def _commit(self, request: Request) -> Response:
        self._writable(request, request.path_params["org"])
        begun = time.monotonic()
        while time.monotonic() - begun < self.commit_takes_s:  # a test may make it 0 meanwhile
            await asyncio.sleep(0.1)
        if self.fails:
            self.fails -= 1
            raise Refused(503, "")
        name = f"{request.path_params['org']}/{request.path_params['name']}"
        repository = self.repositories["model", name]
        header, *operations = [json.loads(line) for line in (await request.body()).splitlines()]
        folder = self.folder / name / str(len(repository.commits))
        shutil.copytree(self.written(name), folder)
        for operation in operations:
            about = operation["value"]
            path = folder / about["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            match operation["key"]:
                case "file":
                    path.write_bytes(base64.b64decode(about["content"]))
                case "lfsFile":
                    path.write_bytes(self.objects[about["oid"]])
                case "deletedFile":
                    path.unlink()
        commit = repository.push(folder)
        said = header["value"]
        self.log[name].insert(0, (commit, said["summary"], said["description"]))
        return JSONResponse(
            {"commitUrl": f"{self.endpoint}/{name}/commit/{commit}", "commitOid": commit, "success": True}
        )

    async def _commits(self, request: Request) -> Response:
        name = f"{request.path_params['org']}/{request.path_params['name']}"
        listed = [
            {"id": commit, "title": title, "message": message, "date": "2026-01-01T00:00:00.000Z", "authors": []}
            for commit, title, message in self.log[name]
        ]
        return JSONResponse(listed)
