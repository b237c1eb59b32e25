"""Merges that leave the service: what goes along with them, and the places that they are published at."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from transformers import AutoModelForSequenceClassification

from app.cli import main
from app.cli.exits import Exit
from app.contracts.provenance import CHECKPOINT_DIGEST
from app.contracts.settings import Settings
from tests.conftest import Service, assert_problem, free_port, make_service, tiny_recipe, wait_until
from tests.writable_hub import WritableHub
from worker.publisher import published
from worker.publishing import Order

REPOSITORY = Path(__file__).parents[2]
MLFLOW_TOKEN = "mlflow_secret_of_the_tests"
LICENCES = {"a": "cc-by-nc-4.0", "b": "gpl-3.0"}


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a private key and its public key, each in a file."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def publishing(*targets: str, **changes: Any) -> dict[str, Any]:
    """A merge that is published at places."""
    recipe = tiny_recipe("a", "b", name="average")
    return {**recipe, "output": {"publish": list(targets)}, **changes}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def public_key(root: Path) -> Path:
    return key_pair(root, "service")[1]


@pytest.fixture(scope="module")
def hub(root: Path) -> Iterator[WritableHub]:
    hub = WritableHub(free_port(), folder=root / "hub")
    with hub.serving():
        yield hub


@pytest.fixture(scope="module")
def mlflow_url() -> str:
    """Address that an MLflow server gets, if a test starts one."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def mlflow(root: Path, mlflow_url: str) -> Iterator[httpx.Client]:
    """A real MLflow server, which lies in an environment of its own, since it does not take this one's pyarrow."""
    program = os.environ.get("MASKMERGE_TEST_MLFLOW") or str(REPOSITORY / ".venv-mlflow" / "bin" / "mlflow")
    if not Path(program).exists():
        pytest.skip(f"there is no MLflow at {program}: python -m venv .venv-mlflow, and install mlflow==3.17.2 there")
    folder = root / "mlflow"
    folder.mkdir()
    command = [program, "server", "--host", "127.0.0.1", "--port", mlflow_url.rpartition(":")[2], "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "files")]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*command, *stores], stdout=log, stderr=log, cwd=folder, start_new_session=True) as process,
        httpx.Client(base_url=mlflow_url) as client,
    ):

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            with suppress(httpx.TransportError):
                return client.get("/health").is_success
            return False

        wait_until(answers, "the MLflow server answers")
        yield client
        os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def service(root: Path, tiny_inputs: Path, public_key: Path, hub: WritableHub, mlflow_url: str) -> Iterator[Service]:
    inputs = root / "inputs"
    for part in ("checkpoints/a", "checkpoints/b", "rows"):
        shutil.copytree(tiny_inputs / part, inputs / part)
    for name, licence in LICENCES.items():
        (inputs / "checkpoints" / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    (root / "hub.token").write_text(f"{hub.write_token}\n")
    (root / "mlflow.token").write_text(f"{MLFLOW_TOKEN}\n")
    servers = {"prod": {"url": mlflow_url, "token_file": str(root / "mlflow.token")}}
    service = make_service(
        root,
        inputs,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_ENDPOINT=hub.endpoint,
        HF_HOME=str(root / "hf"),
        HF_TOKEN=hub.token,
        MASKMERGE_SIGNING_KEY=str(public_key.with_suffix(".pem")),
        MASKMERGE_PUBLISH_TARGETS="hf:acme/*,hf:other/*,mlflow:prod/{tenant}_*",
        MASKMERGE_HUB_TOKEN_FILE=str(root / "hub.token"),
        MASKMERGE_MLFLOW_SERVERS=json.dumps(servers),
    )
    service.start()
    yield service
    assert service.stop() == 0


@pytest.fixture(scope="module")
def job(service: Service) -> dict[str, Any]:
    job = service.finished(service.submit(publishing("hf:acme/both")))
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
    documents = {"manifest.json", "provenance.json", "provenance.intoto.jsonl"}
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


def test_a_merge_of_a_merge_keeps_the_licences_and_is_verified_by_itself(
    service: Service, job: dict[str, Any], downloaded: Path, public_key: Path, tmp_path: Path
) -> None:
    """Its provenance names the model that it is made of by the digests that the first artifact's provenance has."""
    models = [{"name": "first", "checkpoint": f"job:{job['id']}/a"}, {"name": "b", "checkpoint": "local:checkpoints/b"}]
    base = f"job:{job['id']}/b"
    chained = service.finished(service.submit({"models": models, "base": base, "method": {"name": "task_arithmetic"}}))
    assert chained["status"] == "succeeded", chained["error"]
    with tarfile.open(fileobj=BytesIO(service.get(f"/jobs/{chained['id']}/archive").content)) as archive:
        archive.extractall(tmp_path, filter="data")
    assert main(["verify", str(tmp_path), "--key", str(public_key)]) == Exit.OK
    definition = json.loads((tmp_path / "provenance.json").read_text())["predicate"]["buildDefinition"]
    found = {dependency["name"]: dependency for dependency in definition["resolvedDependencies"]}
    both = {"license": "cc-by-nc-4.0 AND gpl-3.0"}
    assert [found[name].get("annotations") for name in ("first", "b", "base")] == [both, {"license": "gpl-3.0"}, both]
    first = json.loads((downloaded / "provenance.json").read_text())
    for name, model in (("first", "a"), ("base", "b")):
        assert found[name]["uri"] == f"job:{job['id']}/{model}"
        of_files = {subject["name"]: subject["digest"]["sha256"] for subject in first["subject"]}
        of_model = {Path(of).name: digest for of, digest in of_files.items() if of.startswith(f"models/{model}/")}
        read = ["config.json", *sorted(of for of in of_model if of.endswith(".safetensors"))]
        lines = "".join(f"{of}\0{of_model[of]}\n" for of in read)
        assert found[name]["digest"] == {CHECKPOINT_DIGEST: hashlib.sha256(lines.encode()).hexdigest()}
    noted = [note for note in chained["result"]["notes"] if note.startswith("licences: ")]
    assert "of first, the base, restricts commercial use" in noted[0]


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


def test_a_repository_gets_one_commit_with_everything(
    service: Service, hub: WritableHub, job: dict[str, Any], downloaded: Path, public_key: Path
) -> None:
    [found] = job["result"]["published"]
    [newest, _] = hub.log["acme/both"]
    assert (found["outcome"], found["versions"]) == ("published", {"acme/both": newest[0]})
    assert newest[1] == "Merge a+b"
    assert job["id"] in newest[2]
    assert hub.repositories["model", "acme/both"].private
    published = hub.written("acme/both")
    names = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert names - {".gitattributes"} == {
        p.relative_to(downloaded).as_posix() for p in downloaded.rglob("*") if p.is_file()
    }
    assert main(["verify", str(published), "--key", str(public_key)]) == Exit.OK
    card = (published / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("acme/both", subfolder="models/a")' in card
    assert f"published at hf:acme/both: acme/both {newest[0]}" in job["result"]["notes"]
    events = service.get(f"/jobs/{job['id']}/log").text
    assert "published at hf:acme/both" in events
    assert found["url"] == f"{hub.endpoint}/acme/both/tree/{newest[0]}"
    for secret in (hub.write_token, MLFLOW_TOKEN):
        assert secret not in json.dumps(job) + service.log + events


def test_a_published_model_is_the_merge(hub: WritableHub, job: dict[str, Any], downloaded: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    for name in "ab":
        published, own = (
            AutoModelForSequenceClassification.from_pretrained(folder / "models" / name)(ids).logits
            for folder in (hub.written("acme/both"), downloaded)
        )
        assert torch.equal(published, own)


def test_a_retried_attempt_makes_no_second_commit(service: Service, hub: WritableHub) -> None:
    hub.fails = 2
    first = service.finished(service.submit(publishing("hf:acme/again")))
    assert first["result"]["published"][0]["outcome"] == "published"  # after two tries in vain
    order = {
        "folder": str(service.data_dir / "artifacts" / f"{first['id']}.1"),
        "job": first["id"],
        "name": first["name"],
        "tenant": "default",
        "accepted": None,
        "targets": ["hf:acme/again", "hf:elsewhere/again"],
        "facts": {},
    }
    environment = {**os.environ, **service.environment}
    script = "import os, sys; from worker.publisher import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(order).encode(),
        env=environment,
        capture_output=True,
        check=True,
    )
    again, elsewhere = map(json.loads, done.stdout.splitlines())
    assert (again["outcome"], again["versions"]) == ("unchanged", first["result"]["published"][0]["versions"])
    assert elsewhere["error"]["code"] == "refused"
    assert len(hub.log["acme/again"]) == 2


@pytest.mark.parametrize("content", ["", "two words", None])
def test_without_a_token_of_its_own_nothing_is_published(
    service: Service, job: dict[str, Any], tmp_path: Path, content: str | None
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    folder = service.data_dir / "artifacts" / f"{job['id']}.1"
    order = Order(folder=folder, job="j", name="n", tenant="default", accepted=None, targets=[], facts={})
    error = published("hf:acme/x", order, Settings(publish_targets=("hf:acme/*",), hub_token_file=token)).error
    assert error is not None
    assert error.code == "denied"
    assert not content or content not in error.message


def test_a_later_merge_replaces_the_files_of_the_one_before(service: Service, hub: WritableHub) -> None:
    foreign = hub.written("acme/again") / "checkpoint-500" / "model.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's")
    recipe = publishing("hf:acme/again")
    recipe["models"] = [{**model, "name": f"{model['name']}2"} for model in recipe["models"]]
    job = service.finished(service.submit(recipe))
    assert job["result"]["published"][0]["outcome"] == "published"
    models = {path.name for path in (hub.written("acme/again") / "models").iterdir() if any(path.iterdir())}
    assert models == {"a2", "b2"}
    assert (hub.written("acme/again") / "checkpoint-500" / "model.safetensors").read_bytes() == b"somebody's"


def test_a_place_that_fails_loses_no_artifact(
    service: Service, tmp_path: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(publishing("hf:other/denied", "hf:acme/after")))
    assert main(["submit", str(path), "--url", service.url, "--wait", "--json"]) == Exit.NOT_PUBLISHED
    job = json.loads(capsys.readouterr().out)
    denied, after = job["result"]["published"]
    assert (job["status"], denied["outcome"], after["outcome"]) == ("succeeded", "failed", "published")
    assert denied["error"]["code"] == "denied"
    assert not denied["error"]["retryable"]
    assert "403" in job["result"]["notes"][0]
    assert job["result"]["notes"][0].startswith("not published at hf:other/denied: ")
    assert service.get(f"/jobs/{job['id']}/artifacts").json()["files"]


def test_what_is_not_accepted_is_published_nowhere(service: Service, hub: WritableHub) -> None:
    asked = publishing("hf:acme/not-accepted", "mlflow:prod/default_x@champion", accept={"min_mean_retention": 2})
    job = service.finished(service.submit(asked))
    assert [found["outcome"] for found in job["result"]["published"]] == ["withheld", "withheld"]
    assert job["result"]["notes"][0].startswith("the merge is not accepted")
    assert ("model", "acme/not-accepted") not in hub.repositories


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("hf:elsewhere/x", "MASKMERGE_PUBLISH_TARGETS"),
        ("mlflow:prod/somebody_x", "MASKMERGE_PUBLISH_TARGETS"),
        ("mlflow:other/default_x", "MASKMERGE_PUBLISH_TARGETS"),
        ("mlflow:prod/default_x@champion", "state accept"),
        ("http://127.0.0.1/x", "no place to publish at"),
        ("mlflow:http://127.0.0.1:1/x", "no place to publish at"),
        ("hf:acme/../x", "no place to publish at"),
        ("hf:acme/x/../../other/y", "no place to publish at"),
        ("hf:acme/x@main", "no place to publish at"),
    ],
)
def test_a_place_that_is_not_allowed_is_refused_before_there_is_a_job(service: Service, target: str, says: str) -> None:
    response = service.post("/merge", json=publishing("hf:acme/x", target))
    assert_problem(response, 422, "invalid_request")
    [error] = response.json()["errors"]
    assert error["field"].startswith("output.publish")
    assert says in error["message"]


def test_a_cancelled_job_stops_publishing(service: Service, hub: WritableHub) -> None:
    hub.commit_takes_s = 60
    try:
        job_id = service.submit(publishing("hf:acme/cancelled"))
        wait_until(lambda: any("cancelled/commit" in asked for asked in hub.requests), "the job publishes")
        service.post(f"/jobs/{job_id}/cancel")
        start = time.monotonic()
        assert service.finished(job_id)["status"] == "cancelled"
        assert time.monotonic() - start < 10
    finally:
        hub.commit_takes_s = 0
    assert len(hub.log["acme/cancelled"]) == 1


def test_a_registry_gets_versions_metrics_and_the_alias(service: Service, mlflow: httpx.Client) -> None:
    target = "mlflow:prod/default_reviews@champion"
    job = service.finished(service.submit(publishing(target, accept={"min_mean_retention": 0})))
    [found] = job["result"]["published"]
    assert (found["outcome"], found["versions"]) == (
        "published", {"default_reviews-a": "1", "default_reviews-b": "1"},
    ), found  # fmt: skip

    def asks(path: str, **parameters: str) -> Any:
        return mlflow.get(f"/api/2.0/mlflow/{path}", params=parameters).raise_for_status().json()

    version = asks("registered-models/alias", name="default_reviews-a", alias="champion")["model_version"]
    assert version["version"] == "1"
    run = asks("runs/get", run_id=version["run_id"])["run"]
    logged = {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}
    result = job["result"]
    assert logged["mean_retention"] == pytest.approx(result["mean_retention"])
    assert logged["a/accuracy"] == pytest.approx(result["metrics"]["a"]["merged"])
    assert {param["key"]: param["value"] for param in run["data"]["params"]}["method.name"] == "average"
    assert run["info"]["status"] == "FINISHED"
    listed = {file["path"] for file in asks("artifacts/list", run_id=version["run_id"])["files"]}
    assert {"models", "report.html", "report.json", "README.md", "provenance.json"} <= listed
    place = version["source"].removeprefix("mlflow-artifacts:/")
    weights = mlflow.get(f"/api/2.0/mlflow-artifacts/artifacts/{place}/config.json")
    own = service.get(f"/jobs/{job['id']}/artifacts/models/a/config.json")
    assert weights.content == own.content
    for alone in ("mlflow:prod/default_reviews", target):
        order = Order(
            folder=service.data_dir / "artifacts" / f"{job['id']}.1",
            job=job["id"],
            name=job["name"],
            tenant="default",
            accepted=True,
            targets=[alone],
            facts={},
        )
        again = published(alone, order, Settings(**settings_of(service)))
        assert (again.outcome, again.versions) == ("unchanged", found["versions"]), again
    assert len(asks("model-versions/search", filter="name = 'default_reviews-a'")["model_versions"]) == 1


def test_a_registry_that_is_away_is_told(
    service: Service, mlflow: httpx.Client, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.publisher.PAUSES_S", (0.01,))
    artifact = next((service.data_dir / "artifacts").iterdir())
    order = Order(folder=artifact, job="j", name="n", tenant="default", accepted=True, targets=[], facts={})
    settings = settings_of(service)
    away = {**settings, "mlflow_servers": {"prod": {"url": f"http://127.0.0.1:{free_port()}"}}}
    found = published("mlflow:prod/default_x", order, Settings(**away))
    assert found.error is not None
    assert (found.error.code, found.error.retryable) == ("unavailable", True)
    other = {**settings, "mlflow_servers": {"prod": {"url": f"{service.url}"}}}
    found = published("mlflow:prod/default_x", order, Settings(**other))
    assert found.error is not None
    assert found.error.code in ("refused", "denied")


def settings_of(service: Service) -> dict[str, Any]:
    """Return the settings of the service that publishing needs."""
    found = service.environment
    return {
        "publish_targets": found["MASKMERGE_PUBLISH_TARGETS"],
        "mlflow_servers": json.loads(found["MASKMERGE_MLFLOW_SERVERS"]),
        "hub_token_file": found["MASKMERGE_HUB_TOKEN_FILE"],
    }
