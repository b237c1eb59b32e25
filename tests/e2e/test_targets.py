"""What goes along with a merge that leaves the service: where it comes from, its licences, and who says so."""

import json
import shutil
import subprocess
import tarfile
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from app.cli import main
from app.cli.exits import Exit
from app.contracts.provenance import CHECKPOINT_DIGEST
from tests.conftest import Service, make_service, tiny_recipe

LICENCES = {"a": "cc-by-nc-4.0", "b": "gpl-3.0"}


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a private key and its public key, each in a file."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def public_key(root: Path) -> Path:
    return key_pair(root, "service")[1]


@pytest.fixture(scope="module")
def service(root: Path, tiny_inputs: Path, public_key: Path) -> Iterator[Service]:
    inputs = root / "inputs"
    for part in ("checkpoints/a", "checkpoints/b", "rows"):
        shutil.copytree(tiny_inputs / part, inputs / part)
    for name, licence in LICENCES.items():
        (inputs / "checkpoints" / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    service = make_service(root, inputs, MASKMERGE_SIGNING_KEY=str(public_key.with_suffix(".pem")))
    service.start()
    yield service
    assert service.stop() == 0


@pytest.fixture(scope="module")
def job(service: Service) -> dict[str, Any]:
    job = service.finished(service.submit(tiny_recipe("a", "b", name="average")))
    assert job["status"] == "succeeded", job["error"]
    return job


@pytest.fixture(scope="module")
def downloaded(service: Service, job: dict[str, Any], root: Path) -> Path:
    folder = root / "downloaded"
    with tarfile.open(fileobj=BytesIO(service.get(f"/jobs/{job['id']}/archive").content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_licences_are_in_result_card_and_manifest(job: dict[str, Any], downloaded: Path) -> None:
    assert {model["name"]: model["license"] for model in job["result"]["models"]} == LICENCES
    manifest = json.loads((downloaded / "manifest.json").read_text())
    assert {name: about["license"] for name, about in manifest["inputs"].items()} == LICENCES
    card = (downloaded / "README.md").read_text()
    assert all(licence in card for licence in LICENCES.values())
    assert not card.startswith("---\nlicense:")  # they have none in common
    noted = [note for note in job["result"]["notes"] if note.startswith("licences: ")]
    assert ["commercial use" in noted[0], "under the same licence" in noted[1]] == [True, True]


def test_provenance_names_every_file_and_every_input(job: dict[str, Any], downloaded: Path) -> None:
    statement = json.loads((downloaded / "provenance.json").read_text())
    files = {path.relative_to(downloaded).as_posix() for path in downloaded.rglob("*") if path.is_file()}
    documents = {"README.md", "manifest.json", "provenance.json", "provenance.intoto.jsonl"}
    assert {subject["name"] for subject in statement["subject"]} == files - documents
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["recipe"] == json.loads((downloaded / "recipe.json").read_text())
    inputs = {found["name"]: found for found in definition["resolvedDependencies"]}
    for model in job["result"]["models"]:
        assert inputs[model["name"]]["uri"] == model["checkpoint"]
        assert f"sha256:{inputs[model['name']]['digest'][CHECKPOINT_DIGEST]}" == model["digest"]
    run = statement["predicate"]["runDetails"]
    assert run["metadata"]["invocationId"] == f"urn:maskmerge:job:{job['id']}:1"
    listed = {file["name"] for file in json.loads((downloaded / "manifest.json").read_text())["files"]}
    assert listed == files - {"manifest.json"}


def test_an_artifact_is_verified_by_its_public_key(
    downloaded: Path, public_key: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(downloaded), "--key", str(public_key)]) == Exit.OK
    assert f"signed by the owner of {public_key}" in capsys.readouterr().out
    assert main(["verify", str(downloaded)]) == Exit.OK
    assert "the signature was not checked" in capsys.readouterr().out
    _, other = key_pair(root, "other")
    assert main(["verify", str(downloaded), "--key", str(other)]) == Exit.ERROR
    assert "this key did not sign it" in capsys.readouterr().err


def test_a_changed_file_or_statement_is_found(
    downloaded: Path, public_key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(downloaded, folder)
    (folder / "models" / "a" / "pytorch_model.bin").write_bytes(b"added")
    config = folder / "models" / "b" / "config.json"
    config.write_text(config.read_text() + " ")
    (folder / "recipe.json").unlink()
    asks = ["verify", str(folder), "--key", str(public_key)]
    assert main(asks) == Exit.ERROR
    told = capsys.readouterr().out
    assert told.splitlines() == [
        "models/b/config.json was changed",
        "recipe.json is missing",
        "models/a/pytorch_model.bin is not part of the artifact",
    ]
    envelope = folder / "provenance.intoto.jsonl"
    signed = json.loads(envelope.read_text())
    envelope.write_text(json.dumps({**signed, "payload": signed["payload"][:-8] + "AAAAAAAA"}))
    assert main(asks) == Exit.ERROR
    assert "this key did not sign it" in capsys.readouterr().err
    for broken in (
        "{}",
        "no JSON",
        json.dumps({**signed, "signatures": []}),
        json.dumps({**signed, "payloadType": "a"}),
    ):
        envelope.write_text(broken)
        assert main(asks) == Exit.ERROR
        assert "Traceback" not in capsys.readouterr().err
    envelope.unlink()
    assert main(asks) == Exit.ERROR
    assert "MASKMERGE_SIGNING_KEY" in capsys.readouterr().err


def test_openssl_verifies_the_signature_too(downloaded: Path, public_key: Path, tmp_path: Path) -> None:
    envelope = json.loads((downloaded / "provenance.intoto.jsonl").read_text())
    payload, kind = b64decode(envelope["payload"]), envelope["payloadType"]
    assert payload == (downloaded / "provenance.json").read_bytes()
    (tmp_path / "signed").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload))
    (tmp_path / "signature").write_bytes(b64decode(envelope["signatures"][0]["sig"]))
    asks = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public_key), "-rawin"]
    done = subprocess.run(
        [*asks, "-in", str(tmp_path / "signed"), "-sigfile", str(tmp_path / "signature")],
        capture_output=True,
        text=True,
    )
    assert "Signature Verified Successfully" in done.stdout + done.stderr


@pytest.mark.parametrize("content", ["", "no key", None])
def test_a_service_does_not_start_with_a_key_that_cannot_sign(
    tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key.pem"
    if content is not None:
        key.write_text(content)
    monkeypatch.setenv("MASKMERGE_SIGNING_KEY", str(key))
    assert main(["serve", "--data-dir", str(tmp_path / "data"), "--port", "0"]) == Exit.ERROR
    told = capsys.readouterr().err
    assert "MASKMERGE_SIGNING_KEY" in told
    assert content not in told.replace(str(key), "") if content else True
