"""Dockerfiles and the compose file, read as Docker reads them, so that what they say can be run without Docker."""

import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tests.conftest import REPOSITORY

COMPOSE = REPOSITORY / "docker-compose.yml"
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<text>[^}]*))?\})")


class NotSet(Exception):
    """A variable that the compose file demands is not set; the message is what Compose shows."""


def interpolate(text: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        found = variables.get(match["name"], "")
        if not found and match["kind"] == "?":
            raise NotSet(f"{match['name']} {match['text']}")
        return found or (match["text"] if match["kind"] == "-" else "")

    return VARIABLE.sub(value, text)


def compose(variables: dict[str, str]) -> dict[str, Any]:
    """The compose file with merges and variables resolved. Raises NotSet."""

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: resolved(value) for key, value in node.items()}
        if isinstance(node, list):
            return [resolved(value) for value in node]
        return interpolate(node, variables) if isinstance(node, str) else node

    document: dict[str, Any] = resolved(yaml.safe_load(COMPOSE.read_text()))
    return document


def service_environment(service: dict[str, Any], variables: dict[str, str]) -> dict[str, str]:
    """Variables without a value are passed on when they are set."""
    given = {name: variables.get(name) if value is None else value for name, value in service["environment"].items()}
    return {name: value for name, value in given.items() if value is not None}


def published_variables() -> set[str]:
    """Every variable of the caller that the compose file reads."""
    text = COMPOSE.read_text()
    document = yaml.safe_load(text)
    passed = {
        name
        for service in document["services"].values()
        for name, value in service["environment"].items()
        if value is None
    }
    return passed | {match["name"] for match in VARIABLE.finditer(text) if match["name"]}


@dataclass(frozen=True)
class Instruction:
    stage: int
    keyword: str
    text: str

    @property
    def words(self) -> list[str]:
        return [word for word in shlex.split(self.text) if not word.startswith("--")]


@dataclass(frozen=True)
class Dockerfile:
    instructions: tuple[Instruction, ...]

    @classmethod
    def read(cls, path: Path) -> "Dockerfile":
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        instructions = []
        stage = -1
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            keyword, _, text = line.partition(" ")
            stage += keyword == "FROM"
            instructions.append(Instruction(stage, keyword, text))
        return cls(tuple(instructions))

    def all(self, keyword: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.keyword == keyword]

    @property
    def last_stage(self) -> list[Instruction]:
        return [i for i in self.instructions if i.stage == self.instructions[-1].stage]

    def copied(self, stage: int) -> list[str]:
        """What a stage takes from the repository."""
        return [
            source
            for instruction in self.all("COPY")
            if instruction.stage == stage and "--from=" not in instruction.text
            for source in instruction.words[:-1]
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Of a container."""
        pairs = [word for i in self.last_stage if i.keyword == "ENV" for word in i.words]
        return dict(pair.split("=", 1) for pair in pairs)

    def one(self, keyword: str) -> str:
        (instruction,) = [i for i in self.last_stage if i.keyword == keyword]
        return instruction.text


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: the last pattern that matches it or a parent decides."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    parents = [PurePosixPath(path), *list(PurePosixPath(path).parents)[:-1]]
    ignored = False
    for line in (line for line in lines if line and not line.startswith("#")):
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            matches = any(fnmatch(parent.name, pattern[3:]) for parent in parents)
        else:
            matches = any(
                len(parent.parts) == len(PurePosixPath(pattern).parts) and fnmatch(str(parent), pattern)
                for parent in parents
            )
        if matches:
            ignored = not line.startswith("!")
    return ignored
