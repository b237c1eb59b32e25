"""A small Hugging Face hub on loopback: what its client libraries ask for when they read models and data sets."""

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CHUNK_BYTES = 1 << 16


@dataclass
class Repository:
    """A model or data set with one branch; `commits` has every folder that was pushed, by its commit."""

    kind: str
    name: str
    private: bool
    commits: dict[str, Path] = field(default_factory=dict)

    def push(self, folder: Path) -> str:
        """Make `folder`, which must not change any more, the branch's newest commit."""
        commit = hashlib.sha1(f"{len(self.commits)} {folder}".encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = folder
        return commit

    @property
    def newest(self) -> str:
        return list(self.commits)[-1]

    def commit_at(self, revision: str) -> str | None:
        return self.newest if revision == "main" else revision if revision in self.commits else None


@dataclass
class Hub:
    """Serves `repositories`; `requests` is what was asked, `bytes_per_second` slows downloads down."""

    port: int
    token: str = "hf_secret_of_the_tests"
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    bytes_per_second: float | None = None
    is_down: bool = False
    answer: tuple[int, bytes] | None = None
    """Sent for whatever is asked, as a proxy in between would."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens that may read what is private."""
        return (self.token,)

    def add(self, kind: str, name: str, folder: Path, *, private: bool = False) -> Repository:
        repository = self.repositories[kind, name] = Repository(kind, name, private)
        repository.push(folder)
        return repository

    def serving(self) -> "Serving":
        return Serving(
            Starlette(routes=self.routes(), exception_handlers={Refused: _refuse, Instead: _answer_instead}), self.port
        )

    def routes(self) -> list[Route]:
        """Return what it answers, the first that fits."""
        return [
            Route("/api/{kinds}/{org}/{name}", self._info),
            Route("/api/{kinds}/{org}/{name}/revision/{revision:path}", self._info),
            Route("/api/{kinds}/{org}/{name}/tree/{rest:path}", self._tree),
            Route("/api/{kinds}/{org}/{name}/paths-info/{revision:path}", self._paths, methods=["POST"]),
            Route("/datasets/{org}/{name}/resolve/{rest:path}", self._file),
            Route("/{org}/{name}/resolve/{rest:path}", self._file),
            Route("/{rest:path}", self._unknown, methods=["GET", "POST", "HEAD"]),
        ]

    def _find(self, request: Request, kind: str, revision: str) -> tuple[Repository, str, Path]:
        """The repository, the commit and its folder. Raises Refused."""
        self.requests.append(f"{request.method} {request.url.path}")
        if self.is_down:
            raise Refused(503, "")
        if self.answer is not None:
            raise Instead(*self.answer)
        asked = f"{request.path_params['org']}/{request.path_params['name']}".lower()  # the hub takes names in any case
        repository = next(
            (r for (of, name), r in self.repositories.items() if of == kind and name.lower() == asked), None
        )
        allowed = request.headers.get("authorization") in {f"Bearer {token}" for token in self.tokens}
        if repository is None or (repository.private and not allowed):
            raise Refused(404, "RepoNotFound")
        commit = repository.commit_at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        return repository, commit, repository.commits[commit]

    async def _info(self, request: Request) -> Response:
        kind = request.path_params["kinds"].removesuffix("s")
        repository, commit, folder = self._find(request, kind, request.path_params.get("revision", "main"))
        siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in _files(folder)]
        body = {"id": repository.name, "sha": commit, "private": repository.private, "siblings": siblings}
        return JSONResponse({**body, "tags": [], "downloads": 0, "likes": 0})

    async def _tree(self, request: Request) -> Response:
        revision, _, inner = request.path_params["rest"].partition("/")
        _, _, folder = self._find(request, request.path_params["kinds"].removesuffix("s"), revision)
        prefix = f"{inner}/" if inner else ""
        names = [name for name in _files(folder) if name.startswith(prefix)]
        if inner and not names:
            raise Refused(404, "EntryNotFound")
        folders = sorted({name[: name.index("/", len(prefix))] for name in names if "/" in name[len(prefix) :]})
        if request.query_params.get("recursive", "").lower() != "true":
            names = [name for name in names if "/" not in name[len(prefix) :]]
        entries = [_entry(folder, name) for name in names]
        return JSONResponse(
            [*entries, *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders)]
        )

    async def _paths(self, request: Request) -> Response:
        kind = request.path_params["kinds"].removesuffix("s")
        _, _, folder = self._find(request, kind, request.path_params["revision"])
        asked = (await request.form()).getlist("paths")
        return JSONResponse([_entry(folder, name) for name in _files(folder) if name in asked])

    async def _file(self, request: Request) -> Response:
        kind = "dataset" if request.url.path.startswith("/datasets/") else "model"
        revision, _, name = request.path_params["rest"].partition("/")
        _, commit, folder = self._find(request, kind, revision)
        if name not in _files(folder):
            raise Refused(404, "EntryNotFound")
        content = (folder / name).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(content)}"', "Accept-Ranges": "bytes"}
        status, wanted = 200, request.headers.get("range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            status, content = 206, content[int(first) : end]
        headers["Content-Length"] = str(len(content))
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        return StreamingResponse(self._slowly(content), status, headers=headers)

    def _slowly(self, content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            if self.bytes_per_second:
                time.sleep(len(chunk) / self.bytes_per_second)
            yield chunk

    async def _unknown(self, request: Request) -> Response:
        self.unknown.append(f"{request.method} {request.url}")
        return JSONResponse({"error": "not found"}, 404)


class Refused(Exception):
    """Answered with the status and the hub's own code."""


class Instead(Exception):
    """Answered with the status and the body."""


async def _answer_instead(request: Request, error: Exception) -> Response:
    status, body = error.args
    return Response(body, status)


async def _refuse(request: Request, error: Exception) -> Response:
    status, code = error.args
    return JSONResponse({"error": code}, status, headers={"X-Error-Code": code} if code else {})


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, name: str) -> dict[str, Any]:
    content = (folder / name).read_bytes()
    return {"type": "file", "path": name, "oid": _digest(content), "size": len(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class Serving:
    """The hub's server in a thread, while in context."""

    def __init__(self, app: Starlette, port: int) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
