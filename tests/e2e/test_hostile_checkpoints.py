"""Checkpoints and bodies that were made to be slow to read hold up nobody but who sends them."""

import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import HANGS_S, Service, assert_problem, keeps_within, make_service
from tests.tiny import tiny_checkpoint

PROMISE_S = 0.1  # what /healthz takes, but for one answer in a hundred
POSTS = 50
TOKENIZER_BYTES = 46_000_000


def weights(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def ones(count: int) -> bytes:
    return weights(b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * count) + b'],"data_offsets":[0,4]}}') + bytes(
        4
    )


def long_names(folder: Path) -> None:
    names = {f"{index}{'n' * 90_000}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(100)}
    (folder / "model.safetensors").write_bytes(weights(json.dumps(names).encode()))


def config(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_bytes(content)


def index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = {f"model.layers.{index}.x": f"model-{index % 900}.safetensors" for index in range(180_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def vocabulary(size: int) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        tokens = {f"token number {index}": index for index in range(size // 33)}
        tokenizer = {"model": {"type": "WordPiece", "vocab": tokens}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return write


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a shape of 800,000 ones": lambda folder: (folder / "model.safetensors").write_bytes(ones(800_000)),
    "a key of 160 kB": config(b'{"model_type":"llama","' + b"dropout" * 23_000 + b'\\n":1}'),
    "deep lists": config(b'{"model_type":"llama","a":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    "deep objects": config(b'{"a":' * 900 + b"1" + b"}" * 900),
    "an index of 10 MB": index,
    "a vocabulary of 10 MB": vocabulary(10_000_000),
    "names of 90 kB": long_names,
    "a number of 4,000,000 digits": config(b'{"hidden_size":' + b"9" * 4_000_000 + b"}"),
}


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose local root has a checkpoint of each hostile kind, and `tokenizers/0` to `7` of 46 MB."""
    root = tmp_path_factory.mktemp("besieged")
    inputs = root / "inputs"
    plain = inputs / "plain"
    tiny_checkpoint(plain, labels=2)
    for name, spoil in HOSTILE.items():
        shutil.copytree(plain, inputs / name)
        spoil(inputs / name)
    for number in range(8):
        folder = inputs / "tokenizers" / str(number)
        shutil.copytree(plain, folder)
        if number == 0:
            vocabulary(TOKENIZER_BYTES)(folder)
        else:
            (folder / "tokenizer.json").unlink()
            os.link(inputs / "tokenizers" / "0" / "tokenizer.json", folder / "tokenizer.json")
    service = make_service(root, inputs)
    service.start()
    yield service
    service.stop()


def recipe(*checkpoints: str) -> dict[str, Any]:
    models = [{"name": f"m{index}", "checkpoint": f"local:{name}"} for index, name in enumerate(checkpoints)]
    return {"method": {"name": "linear"}, "models": models}


def post(service: Service, *checkpoints: str) -> httpx.Response:
    return service.post("/merge/validate", json=recipe(*checkpoints))


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "a vocabulary of 10 MB"])
def test_each_is_refused_by_name(besieged: Service, kind: str) -> None:
    response = post(besieged, "plain", kind)
    assert_problem(response, 422, "invalid_checkpoint")
    assert f"local:{kind}" in response.json()["detail"]
    assert len(response.content) < 4000


@pytest.mark.long
def test_health_is_told_while_fifty_are_inspected(besieged: Service) -> None:
    kinds = [["plain", kind] for kind in HOSTILE]
    posts = [[f"tokenizers/{number}" for number in range(8)], *(kinds * POSTS)][:POSTS]
    answers = health_while(besieged, [partial(post, besieged, *checkpoints) for checkpoints in posts])
    assert {answer.status_code for answer in answers} <= {200, 422, 503}
    assert any(answer.status_code == 422 for answer in answers)
    assert post(besieged, "plain", "plain").status_code in (200, 503)


BODIES = {
    "YAML of deep lists": ("application/yaml", b"\n".join([b"- " + b"[" * 28 + b"1" + b"]" * 28] * 1600)),
    "YAML of empty lists": ("application/yaml", b"a: [" + b"[]," * 33_000 + b"]"),
    "YAML of anchors": ("application/yaml", b"\n".join(b"- &a%d x" % number for number in range(9000))),
    "YAML without an end": ("application/yaml", b"a: " + b"[" * 99_000),
    "JSON of numbers": ("application/json", b"[" + b"1," * 499_000 + b"1]"),
    "JSON of deep lists": ("application/json", b"[" + b",".join([b"[" * 15 + b"1" + b"]" * 15] * 30_000) + b"]"),
    "JSON of objects": ("application/json", b"[" + b"{}," * 330_000 + b"1]"),
    "JSON of keys": ("application/json", json.dumps({f"k{number}": 1 for number in range(70_000)}).encode()),
}


@pytest.mark.long
def test_health_is_told_while_twenty_bodies_are_read(besieged: Service) -> None:
    def send(media_type: str, body: bytes) -> httpx.Response:
        with besieged.http as http:
            return http.post("/merge/validate", content=body, headers={"Content-Type": media_type})

    posts = [partial(send, *body) for body in [*BODIES.values()] * 3][:20]
    answers = health_while(besieged, posts)
    assert {answer.status_code for answer in answers} <= {400, 422, 503}
    assert any(answer.status_code == 400 for answer in answers)


def health_while(besieged: Service, posts: Sequence[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    """The answers of posts that are sent at once, while `/healthz` keeps its promise."""
    answers: list[httpx.Response] = []

    def attempt() -> float:
        taken: list[float] = []
        are_posted = threading.Event()

        def ask() -> None:
            with besieged.http as http:
                while not are_posted.is_set():
                    begun = time.perf_counter()
                    assert http.get("/healthz").status_code == 200
                    taken.append(time.perf_counter() - begun)
                    time.sleep(0.01)

        with ThreadPoolExecutor(POSTS + 1) as pool:
            asking = pool.submit(ask)
            answers[:] = [sent.result(HANGS_S) for sent in [pool.submit(send) for send in posts]]
            are_posted.set()
            asking.result(HANGS_S)
        return sorted(taken)[int(len(taken) * 0.99)]

    keeps_within(PROMISE_S, attempt)
    return answers
