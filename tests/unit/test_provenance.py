"""What `maskmerge verify` believes: what the key signed, and nothing else in the folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from app.cli import main
from app.cli.exits import Exit
from app.contracts.jobs import Record
from app.storage.signing_keys import SigningKey
from app.storage.targets.card import card_at
from worker.engine.checkpoints.reader import digest_file
from worker.provenance import attest

FILES = {
    "README.md": 'AutoModel.from_pretrained("model")',
    "model/config.json": "{}",
    "model/model.safetensors": "weights",
    "recipe.json": '{"models": [{"name": "a", "checkpoint": "local:a"}]}',
}


@pytest.fixture(scope="module")
def public_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key, folder = Ed25519PrivateKey.generate(), tmp_path_factory.mktemp("keys")
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = folder / "key.pub"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public


@pytest.fixture
def artifact(tmp_path: Path, public_key: Path) -> Path:
    """A signed artifact of a job that also publishes at hf:acme/x."""
    folder = tmp_path / "artifact"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    files = [{"name": n, "bytes": len(c), "sha256": digest_file(folder / n)} for n, c in FILES.items()]
    about = {"checkpoint": "local:a", "digest": "sha256:0"}
    manifest = {"files": files, "inputs": {"a": about}, "method": {}, "device": "cpu", "threads": 1, "versions": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    record = SimpleNamespace(
        id="j", attempt=1, core=lambda: {"started_at": None}, request={"output": {"publish": ["s3:b/c", "hf:acme/x"]}}
    )
    attest(folder, cast("Record", record), SigningKey(public_key.with_suffix(".pem")))
    return folder


def told(folder: Path, key: Path | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["verify", str(folder), *(["--key", str(key)] if key else [])])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def replace(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def add(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("print('evil')")

    return change


def link(folder: Path) -> None:
    (folder.parent / "outside").mkdir()
    (folder / "model" / "extra").symlink_to(folder.parent / "outside")


FORGERIES = {
    "an input": (replace("provenance.json", "local:a", "hf:meta/evil"), "provenance.json was changed"),
    "the manifest": (replace("manifest.json", "local:a", "hf:meta/evil"), "manifest.json was changed"),
    "an entry of the provenance": (
        replace("manifest.json", "provenance.json", "prov.json"),
        "manifest.json was changed",
    ),
    "the card": (replace("README.md", "AutoModel", "Evil"), "README.md was changed"),
    "the card's repository": (replace("README.md", '"model"', '"evil/x"'), "README.md was changed"),
    "a linked folder": (link, "model/extra is a link"),
    "a file named like git's": (add(".gitattributes.py"), ".gitattributes.py is not part of the artifact"),
    "git's folder elsewhere": (add("model/.git/x.py"), "model/.git/x.py is not part of the artifact"),
    "another cache": (add(".cache/x.py"), ".cache/x.py is not part of the artifact"),
    "no readable statement": (lambda folder: (folder / "provenance.json").unlink(), "there is no provenance.json"),
}


@pytest.mark.parametrize("change", FORGERIES)
def test_a_forgery_is_found(artifact: Path, public_key: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    forge, says = FORGERIES[change]
    assert told(artifact, public_key, capsys)[0] == Exit.OK
    forge(artifact)
    status, text = told(artifact, public_key, capsys)
    assert (status, says in text) == (Exit.ERROR, True), text


def test_a_copy_of_its_repository_is_verified_and_what_is_not_covered_is_named(
    artifact: Path, public_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = artifact / "README.md"
    card.write_text(card_at(card.read_text(), "acme/x"))
    for path in (artifact / "model").iterdir():
        path.rename(artifact / path.name)
    (artifact / "model").rmdir()
    assert told(artifact, public_key, capsys)[1].splitlines() == [
        f"7 files are as the provenance says; signed by the owner of {public_key}"
    ]
    for name in (".gitattributes", ".git/config", ".cache/huggingface/x"):
        add(name)(artifact)
    status, text = told(artifact, public_key, capsys)
    assert status == Exit.OK
    assert "not covered: .cache/huggingface/, .git/, .gitattributes; nobody vouches" in text


@pytest.mark.parametrize("name", ["provenance.json", "provenance.intoto.jsonl", "manifest.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "\x00"])
def test_what_cannot_be_read_is_refused(
    artifact: Path, public_key: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact / name).write_text(content)
    for key in (public_key, None):
        status, text = told(artifact, key, capsys)
        assert status == Exit.ERROR, text
        assert "Traceback" not in text


@pytest.mark.parametrize("byproducts", [None, 5, [[]], [{"name": "README.md", "digest": {"sha256": []}}]])
def test_a_malformed_statement_is_refused(artifact: Path, byproducts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    statement = json.loads((artifact / "provenance.json").read_text())
    statement["predicate"]["runDetails"]["byproducts"] = byproducts
    replace("README.md", "AutoModel", "Evil")(artifact)
    (artifact / "provenance.json").write_text(json.dumps(statement))
    assert told(artifact, None, capsys)[0] == Exit.ERROR


def test_a_folder_of_two_layouts_is_none_of_them(
    artifact: Path, public_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(artifact / "model" / "config.json", artifact)
    assert "config.json is not part of the artifact" in told(artifact, public_key, capsys)[1]
