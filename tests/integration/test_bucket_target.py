"""Merges that are published in object storage: whole, once, and below a folder of their job's own."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.contracts.settings import Settings
from app.storage.objects.bucket import Patience
from tests.conftest import free_port
from tests.object_storage.server import KEYS, ObjectServer, moto, set_keys
from worker.engine.catalog.contracts.publication import Publication
from worker.publisher import published
from worker.publishing import Order

FILES = {"model/model.safetensors": b"w" * 3000, "model/config.json": b"{}", "README.md": b"card", "report.json": b"{}"}


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with moto() as server:
        server.make("models", "private")
        yield server


@pytest.fixture
def settings(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    set_keys(monkeypatch)
    monkeypatch.setattr("app.storage.targets.s3.AT_WORK", Patience(request_s=2, retries=1, total_s=2))
    monkeypatch.setattr("worker.publisher.PAUSES_S", ())
    return {"publish_targets": ("s3:models/{tenant}/*", "s3:nowhere/*"), "s3_endpoint": server.url}


def publish(
    folder: Path, settings: dict[str, Any], target: str = "s3:models/team/merges", **changes: bytes
) -> Publication:
    """Publish an artifact of job `j`; `changes` replace files, by their last names."""
    named = {name: changes.get(Path(name).stem, content) for name, content in FILES.items()}
    for name, content in named.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    files = [{"name": n, "bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in named.items()]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    order = Order(folder=folder, job="j", name="n", tenant="team", accepted=None, targets=[], facts={})
    return published(target, order, Settings(**settings))


def test_every_file_is_written_once(server: ObjectServer, settings: dict[str, Any], tmp_path: Path) -> None:
    found = publish(tmp_path, settings)
    assert found.error is None
    assert (found.outcome, found.versions, found.url) == (
        "published", {"models/team/merges": "j"}, "s3://models/team/merges/j/",
    )  # fmt: skip
    kept = [key for key in server.keys("models") if key.startswith("team/")]  # other tests of this process have theirs
    assert kept == sorted(f"team/merges/j/{name}" for name in (*FILES, "manifest.json"))

    def body(name: str) -> bytes:
        return bytes(server.client.get_object(Bucket="models", Key=f"team/merges/j/{name}")["Body"].read())

    assert body("model/model.safetensors") == FILES["model/model.safetensors"]
    assert publish(tmp_path, settings, report=b'{"seconds": 2}').outcome == "unchanged"  # another attempt's times
    assert body("report.json") == b"{}"
    assert publish(tmp_path, settings, config=b'{"a": 1}').outcome == "published"
    assert body("model/config.json") == b'{"a": 1}'


@pytest.mark.parametrize(
    ("target", "code", "says"),
    [
        ("s3:models/other/merges", "refused", "MASKMERGE_PUBLISH_TARGETS"),
        ("s3:private/team/merges", "refused", "MASKMERGE_PUBLISH_TARGETS"),
        ("s3:nowhere/merges", "refused", "there is no bucket nowhere"),
    ],
)
def test_other_places_are_refused(settings: dict[str, Any], tmp_path: Path, target: str, code: str, says: str) -> None:
    error = publish(tmp_path, settings, target).error
    assert error is not None
    assert error.code == code
    assert says in error.message


def test_a_storage_that_is_away_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    error = publish(tmp_path, {**settings, "s3_endpoint": f"http://127.0.0.1:{free_port()}"}).error
    assert error is not None
    assert (error.code, error.retryable) == ("unavailable", True)
    assert not any(secret in error.message for secret in KEYS.values())
