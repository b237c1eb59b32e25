"""What is refused at the door and what fails in the work: the right code, the thing's name, the worker alive."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pytest
import torch
from pyarrow.parquet import write_table as write_parquet
from safetensors.torch import load_file, save_file

from tests.conftest import Service, assert_problem, make_service, tiny_recipe
from tests.tiny import edit_json, tiny_checkpoint
from tests.tiny_families import TINY_FAMILIES

Recipe = dict[str, Any]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Path:
    """The good inputs and many bad ones."""
    root = tmp_path_factory.mktemp("bad")
    shutil.copytree(tiny_inputs, root, dirs_exist_ok=True)
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(root / "checkpoints" / "a", outside / "secret")
    (root / "checkpoints" / "link").symlink_to(outside / "secret")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(root / "checkpoints" / "a", root / "checkpoints" / name))

    weights = broken("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = broken("headless") / "model.safetensors"
    body = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("classifier")}
    save_file(body, weights, {"format": "pt"})
    weights = broken("nan") / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    folder = broken("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    config = broken("code") / "config.json"
    edit_json(config, model_type="own", auto_map={"AutoModel": "evil.Model"})
    weights = broken("unknown-tensor") / "model.safetensors"
    save_file({**load_file(weights), "bert.adapter.weight": torch.zeros(2)}, weights, {"format": "pt"})
    folder = broken("links-out")
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "vocab.txt").symlink_to(outside / "secret" / "config.json")
    tiny_checkpoint(root / "checkpoints" / "wider", hidden=32)
    tiny_checkpoint(root / "checkpoints" / "named", names=["bad", "good"])
    edit_json(broken("vocabulary") / "config.json", vocab_size=50)
    tokens = broken("tokens") / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"w84"', '"another"'))
    (broken("no-tokenizer") / "tokenizer.json").unlink()
    (broken("huge-header") / "model.safetensors").write_bytes(struct.pack("<Q", 10**10) + b"{}")
    tensors = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    header = json.dumps(tensors, separators=(",", ":")).encode()
    (broken("many-tensors") / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    million = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(1_000_000)}
    header = json.dumps(million, separators=(",", ":")).encode()
    (broken("million-tensors") / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    tiny_checkpoint(root / "checkpoints" / "roberta", family=TINY_FAMILIES["roberta"])
    secret = outside / "vocabulary.txt"
    secret.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    tokens = broken("vocabulary-by-name") / "tokenizer.json"
    content = json.loads(tokens.read_text())
    tokens.write_text(json.dumps({**content, "model": {**content["model"], "vocab": str(secret)}}))
    tokens = broken("more-tokens") / "tokenizer.json"
    added = {"id": 100, "content": "<new>", "special": False, "normalized": True}
    edit_json(tokens, added_tokens=[*json.loads(tokens.read_text())["added_tokens"], added])
    (root / "checkpoints" / "circle").symlink_to(root / "checkpoints" / "circle")
    (broken("inner-circle") / "vocab.txt").symlink_to(root / "checkpoints" / "inner-circle" / "vocab.txt")
    folder = broken("long-shard")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": "x" * 300}}))

    rows = root / "rows"
    (rows / "empty.jsonl").write_text("\n \n")
    (rows / "not-json.jsonl").write_text('{"text": "fine", "label": 0}\n{"text": oops}\n')
    (rows / "no-column.jsonl").write_text('{"sentence": "x", "label": 0}\n')
    (rows / "range.jsonl").write_text('{"text": "one", "label": 7}\n')
    good = '{"text": "one two", "label": 0}\n'
    (rows / "late-range.jsonl").write_text(good * 150 + '{"text": "one", "label": 7}\n')
    (rows / "late-column.jsonl").write_text(good * 150 + '{"txt": "one", "label": 0}\n')
    (rows / "surrogate.jsonl").write_text(good * 150 + '{"text": "one", "label": "\\ud800"}\n')
    (rows / "late-json.jsonl").write_text(good * 150 + "{broken\n")
    (rows / "named.csv").write_text("text,label\n" + "one two,good\nthree,bad\n" * 20)
    (rows / "late-field.csv").write_text("text,label\n" + "one two,0\n" * 150 + "one, two,0\n")
    (rows / "semicolons.csv").write_text("text;label\none two;0\n")
    (rows / "rows.xlsx").write_bytes(b"PK")
    (rows / "fake.parquet").write_text("text,label\n")
    write_parquet(pyarrow.table({"txt": ["one"], "label": [0]}), rows / "no-column.parquet")
    write_parquet(pyarrow.table({"text": ["one", None] * 40, "label": [0, 1] * 40}), rows / "null.parquet")
    return root


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Iterator[Service]:
    service = make_service(tmp_path_factory.mktemp("service"), inputs)
    service.start()
    yield service
    assert service.stop() == 0


def changed(**changes: Any) -> Recipe:
    """A good recipe with the value at each dotted path replaced."""
    recipe = tiny_recipe("a", "b")
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = recipe
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    return recipe


def without(field: str) -> Recipe:
    recipe = tiny_recipe("a", "b")
    del recipe["models"][0][field]
    return recipe


# What is posted: (recipe, status, code, what the detail must say)
REFUSED: dict[str, tuple[Recipe, int, str, list[str]]] = {
    "unknown field": (changed(modles=[]), 422, "invalid_request", ["modles", "did you mean 'models'"]),
    "unknown inner field": (
        changed(models__0__chekpoint="x"),
        422,
        "invalid_request",
        ["models.0", "chekpoint", "did you mean 'checkpoint'"],
    ),
    "unknown method": (changed(method__name="mask_fischer"), 422, "invalid_request", ["did you mean 'mask_fisher'"]),
    "unknown parameter": (changed(method__normalise="layer"), 422, "invalid_request", ["did you mean 'normalize'"]),
    "parameter out of range": (changed(method__floor=2), 422, "invalid_request", ["method.floor"]),
    "an estimator of labels without labels": (
        changed(method__estimator="empirical", models__0__dataset__label=None), 422, "invalid_request",
        ["models.0.dataset.label", "reads labels"],
    ),
    "a column that the head does not read": (
        changed(models__0__dataset__target="text"), 422, "invalid_request", ["models.0.dataset.target", "leave it out"],
    ),
    "adaptive stopping without scores": (
        changed(method={"name": "regmean", "examples": "auto"}), 422, "invalid_request", ["'auto'", "regmean"],
    ),
    "tolerance without adaptive stopping": (
        changed(method__tolerance=0.1), 422, "invalid_request", ["tolerance", "examples 'auto'"],
    ),
    "webhook without a secret": (
        changed(webhook={"url": "https://example.org"}), 422, "invalid_request", ["webhook", "no secret to sign with"],
    ),
    "scale without a base": (changed(method__scale=1.2), 422, "invalid_request", ["scale", "name it as base"]),
    "missing base": (changed(base="local:checkpoints/none"), 422, "invalid_request", ["base", "does not exist"]),
    "base of a method that needs one": (
        changed(method={"name": "ties"}), 422, "invalid_request", ["method ties", "name it as base"],
    ),
    "estimates without a base": (
        changed(method={"name": "regmean", "gram": "deltas"}), 422, "invalid_request",
        ["gram 'deltas' merges differences", "name it as base"],
    ),
    "truncated base": (
        changed(base="local:checkpoints/truncated"), 422, "invalid_checkpoint", ["\"field\": \"base\"", "is truncated"],
    ),
    "base of another family": (
        changed(base="local:checkpoints/roberta"), 422, "incompatible_checkpoints", ["bert, roberta"],
    ),
    "missing data set": (without("dataset"), 422, "invalid_request", ["'a'", "no dataset"]),
    "no models": (changed(models=[]), 422, "invalid_request", ["models"]),
    "same name twice": (changed(models__1__name="a"), 422, "invalid_request", ["same name: a"]),
    "name that leaves the folder": (changed(models__0__name=".."), 422, "invalid_request", ["models.0.name"]),
    "all weights 0": (changed(models__0__weight=0, models__1__weight=0), 422, "invalid_request", ["weights"]),
    "no reference": (changed(models__0__checkpoint="checkpoints/a"), 422, "invalid_request", ["local:PATH"]),
    "parent folder": (
        changed(models__0__checkpoint="local:../bad/checkpoints/a"), 422, "invalid_request", ["without '..'"],
    ),
    "absolute path": (changed(models__0__checkpoint="local:/etc"), 422, "invalid_request", ["relative path"]),
    "link out of the root": (
        changed(models__0__checkpoint="local:checkpoints/link"), 422, "invalid_request", ["symbolic link out"],
    ),
    "link inside a checkpoint": (
        changed(models__0__checkpoint="local:checkpoints/links-out"), 422, "invalid_checkpoint",
        ["vocab.txt", "symbolic link out"],
    ),
    "missing checkpoint": (
        changed(models__0__checkpoint="local:checkpoints/none"), 422, "invalid_request", ["does not exist"],
    ),
    "missing rows": (
        changed(models__0__dataset__source="local:rows/none.jsonl"), 422, "invalid_request",
        ["models.0.dataset.source", "does not exist"],
    ),
    "truncated weights": (
        changed(models__0__checkpoint="local:checkpoints/truncated"), 422, "invalid_checkpoint",
        ["local:checkpoints/truncated", "model.safetensors is truncated"],
    ),
    "pickle": (
        changed(models__0__checkpoint="local:checkpoints/pickle"), 422, "invalid_checkpoint",
        ["pytorch_model.bin", "save_pretrained('OUT')"],
    ),
    "code in the checkpoint": (
        changed(models__0__checkpoint="local:checkpoints/code"), 422, "invalid_checkpoint", ["auto_map"],
    ),
    "tensor that no rule owns": (
        changed(models__0__checkpoint="local:checkpoints/unknown-tensor"), 422, "invalid_checkpoint",
        ["bert.adapter.weight"],
    ),
    "no head": (
        changed(models__0__checkpoint="local:checkpoints/headless"), 422, "invalid_checkpoint",
        ["no tensor classifier.weight"],
    ),
    "another vocabulary size": (
        changed(models__1__checkpoint="local:checkpoints/vocabulary"), 422, "incompatible_checkpoints", ["vocab_size"],
    ),
    "a tokenizer that disagrees": (
        changed(models__1__checkpoint="local:checkpoints/tokens"), 422, "incompatible_checkpoints",
        ["local:checkpoints/tokens", "tokenizers"],
    ),
    "no tokenizer": (
        changed(models__1__checkpoint="local:checkpoints/no-tokenizer"), 422, "invalid_checkpoint", ["no tokenizer"],
    ),
    "text in place of a vocabulary, which would be opened": (
        changed(models__0__checkpoint="local:checkpoints/vocabulary-by-name"), 422, "invalid_checkpoint",
        ["tokenizer.json has no vocabulary of its own"],
    ),
    "a token more": (
        changed(models__1__checkpoint="local:checkpoints/more-tokens"), 422, "incompatible_checkpoints", ["tokenizers"],
    ),
    "a link to itself": (
        changed(models__0__checkpoint="local:checkpoints/circle"), 422, "invalid_request", ["cannot be looked up"],
    ),
    "a link to itself inside a checkpoint": (
        changed(models__0__checkpoint="local:checkpoints/inner-circle"), 422, "invalid_checkpoint", ["inner-circle"],
    ),
    "a path too long": (
        changed(models__0__checkpoint="local:" + "x" * 300), 422, "invalid_request", ["models.0.checkpoint"],
    ),
    "a shard's name too long": (
        changed(models__0__checkpoint="local:checkpoints/long-shard"), 422, "invalid_checkpoint", ["long-shard"],
    ),
    "half a surrogate pair as field": (changed(**{"\ud800": 1}), 422, "invalid_request", ["half a surrogate"]),
    "half a surrogate pair as reference": (
        changed(models__0__checkpoint="local:\ud800"), 422, "invalid_request", ["half a surrogate"],
    ),
    "two labels of one name": (
        changed(models__0__evaluation__label_names=["a", "a"]), 422, "invalid_request",
        ["models.0.evaluation.label_names", "same name"],
    ),
    "a column without a name": (
        changed(models__0__dataset__text_pair=""), 422, "invalid_request", ["models.0.dataset.text_pair"],
    ),
    "another architecture": (
        changed(models__1__checkpoint="local:checkpoints/roberta"), 422, "incompatible_checkpoints", ["bert, roberta"],
    ),
    "a header of 10 GB": (
        changed(models__0__checkpoint="local:checkpoints/huge-header"), 422, "invalid_checkpoint",
        ["model.safetensors announces a header of 10000000000 bytes"],
    ),
    "150,000 tensors": (
        changed(models__0__checkpoint="local:checkpoints/many-tensors"), 422, "invalid_checkpoint",
        ["model.safetensors has 150000 tensors; 100000 are allowed"],
    ),
    "a million tensors": (
        changed(models__0__checkpoint="local:checkpoints/million-tensors"), 422, "invalid_checkpoint",
        ["model.safetensors announces a header of"],
    ),
    "sizes that differ": (
        changed(models__1__checkpoint="local:checkpoints/wider"), 422, "incompatible_checkpoints", ["hidden_size"],
    ),
    "empty rows": (
        changed(models__0__dataset__source="local:rows/empty.jsonl"), 422, "invalid_dataset",
        ["rows/empty.jsonl: no rows"],
    ),
    "row that is no JSON": (
        changed(models__0__dataset__source="local:rows/not-json.jsonl"), 422, "invalid_dataset", ["line 2"],
    ),
    "missing column": (
        changed(models__0__dataset__source="local:rows/no-column.jsonl"), 422, "invalid_dataset",
        ["line 1", "no column 'text'"],
    ),
    "label out of range": (
        changed(models__0__evaluation__source="local:rows/range.jsonl"), 422, "invalid_dataset",
        ["models.0.evaluation", "label 7 is out of range", "0 to 1"],
    ),
    "label names that the checkpoint does not have": (
        changed(
            models__0__checkpoint="local:checkpoints/named", models__0__evaluation__label_names=["bad", "fine"],
        ), 422, "invalid_dataset",
        ["models.0.evaluation.label_names", "label 'fine' of label_names is unknown", "bad, good"],
    ),
    "split of a file": (
        changed(models__0__dataset__split="train"), 422, "invalid_request", ["models.0.dataset.split", "of the hub"],
    ),
    "another delimiter": (
        changed(models__0__dataset__source="local:rows/semicolons.csv"), 422, "invalid_dataset",
        ["rows/semicolons.csv, line 2", "no column 'text'"],
    ),
    "names where there are ids": (
        changed(models__0__evaluation__source="local:rows/named.csv"), 422, "invalid_dataset",
        ["rows/named.csv, line 2", "label 'good' is unknown"],
    ),
    "no Parquet": (
        changed(models__0__dataset__source="local:rows/fake.parquet"), 422, "invalid_dataset", ["not a Parquet file"],
    ),
    "unknown format": (
        changed(models__0__dataset__source="local:rows/rows.xlsx"), 422, "invalid_dataset", [".csv, .tsv, .parquet"],
    ),
    "object storage that no setting names": (
        changed(models__0__checkpoint="s3:bucket/a"), 422, "invalid_request", ["models.0.checkpoint"],
    ),
    "repository of a hub that is not asked": (
        changed(models__0__checkpoint="hf:org/name"), 422, "invalid_request", ["models.0.checkpoint", "HF_HUB_OFFLINE"],
    ),
    "metric of another task": (
        changed(models__0__evaluation__metric="pearson"), 422, "invalid_dataset", ["pearson", "accuracy"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_seen_at_once_is_refused_at_the_door(service: Service, case: str) -> None:
    recipe, status, code, says = REFUSED[case]
    for path in ("/merge", "/merge/validate"):
        body = json.dumps(recipe)  # as ASCII, which spells half a surrogate pair too
        response = service.post(path, content=body, headers={"Content-Type": "application/json"})
        assert_problem(response, status, code)
        for words in says:
            assert words in response.text
    assert service.inputs.as_posix() not in response.text, "the server's paths are nobody's business"


# What is accepted and fails in the work: (recipe, code, what the message must say)
FAILING: dict[str, tuple[Recipe, str, list[str]]] = {
    "NaN weights": (
        changed(models__0__checkpoint="local:checkpoints/nan"), "invalid_checkpoint",
        ["local:checkpoints/nan", "bert.encoder.layer.1.output.dense.weight", "NaN"],
    ),
    "NaN in the base": (
        {**changed(method={"name": "ties"}), "base": "local:checkpoints/nan"}, "invalid_checkpoint",
        ["local:checkpoints/nan", "bert.encoder.layer.1.output.dense.weight", "NaN"],
    ),
    "late label out of range": (
        changed(models__1__evaluation__source="local:rows/late-range.jsonl", models__1__evaluation__limit=None),
        "invalid_dataset", ["local:rows/late-range.jsonl, line 151", "label 7"],
    ),
    "late missing column": (
        changed(models__0__dataset__source="local:rows/late-column.jsonl", method__examples=1000),
        "invalid_dataset", ["local:rows/late-column.jsonl, line 151", "no column 'text'", "did you mean 'txt'"],
    ),
    "late row of CSV with a field too many": (
        changed(models__0__dataset__source="local:rows/late-field.csv", method__examples=1000),
        "invalid_dataset", ["rows/late-field.csv, line 152", "3 fields, the header has 2"],
    ),
    "missing column of Parquet": (
        changed(models__0__dataset__source="local:rows/no-column.parquet"),
        "invalid_dataset", ["rows/no-column.parquet", "no column 'text'", "did you mean 'txt'?"],
    ),
    "null in Parquet": (
        changed(models__0__dataset__source="local:rows/null.parquet"),
        "invalid_dataset", ["rows/null.parquet, row ", "column 'text' is not text"],
    ),
    "half a surrogate pair as label": (
        changed(
            models__0__dataset__source="local:rows/surrogate.jsonl", method__examples=1000,
            method__estimator="empirical",
        ), "invalid_dataset", ["rows/surrogate.jsonl, line 151", "is unknown"],
    ),
    "late row that is no JSON": (
        changed(models__0__dataset__source="local:rows/late-json.jsonl", method__examples=1000),
        "invalid_dataset", ["line 151"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_what_only_the_work_shows_fails_the_job_and_the_worker_takes_the_next(service: Service, case: str) -> None:
    recipe, code, says = FAILING[case]
    engine = service.processes()["engine"].pid
    job = service.finished(service.submit(recipe))
    assert job["status"] == "failed"
    assert job["error"]["code"] == code
    for words in says:
        assert words in job["error"]["message"]
    assert job["result"] is None
    assert_problem(service.get(job["links"]["artifacts"]), 409, "conflict")
    assert not list((service.data_dir / "work").iterdir())
    assert not list((service.data_dir / "artifacts").glob(f"{job['id']}*"))
    assert service.finished(service.submit(tiny_recipe("a", name="average")))["status"] == "succeeded"
    assert service.processes()["engine"].pid == engine, "the engine process need not be replaced for bad input"


def test_labels_that_the_estimator_does_not_read_need_not_be_right(service: Service) -> None:
    recipe = changed(models__0__dataset__source="local:rows/range.jsonl", method__estimator="expected")
    assert service.finished(service.submit(recipe))["status"] == "succeeded"


def test_inputs_that_go_away_while_the_job_waits_fail_it(service: Service, inputs: Path) -> None:
    shutil.copytree(inputs / "checkpoints" / "a", inputs / "checkpoints" / "fleeting")
    blocker = service.submit(tiny_recipe("a", "b", "c", examples=200))
    job_id = service.submit(changed(models__0__checkpoint="local:checkpoints/fleeting"))
    shutil.rmtree(inputs / "checkpoints" / "fleeting")
    job = service.finished(job_id)
    assert service.finished(blocker)["status"] == "succeeded"
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_checkpoint")
    assert "fleeting" in job["error"]["message"]


REQUESTS: dict[str, tuple[Callable[[httpx.Client], httpx.Response], int, str]] = {
    "broken JSON": (
        lambda http: http.post("/merge", content="{", headers={"Content-Type": "application/json"}), 400, "malformed",
    ),
    "other content type": (
        lambda http: http.post("/merge", content="a: b", headers={"Content-Type": "application/toml"}),
        415, "unsupported_media_type",
    ),
    "no content type": (lambda http: http.post("/merge", content=b"{}"), 415, "unsupported_media_type"),
    "a list": (lambda http: http.post("/merge", json=[]), 422, "invalid_request"),
    "50 MB": (lambda http: http.post("/merge", json={"name": "x" * 50_000_000}), 413, "too_large"),
    "unknown route": (lambda http: http.get("/nowhere"), 404, "not_found"),
    "wrong method": (lambda http: http.delete("/merge"), 405, "method_not_allowed"),
    "a slash too many": (lambda http: http.get(f"/jobs/{'0' * 28}/"), 404, "not_found"),
    "unknown job": (lambda http: http.get(f"/jobs/{'0' * 28}"), 404, "not_found"),
    "malformed job id": (lambda http: http.get("/jobs/1"), 404, "not_found"),
    "artifacts of no job": (lambda http: http.get(f"/jobs/{'0' * 28}/artifacts"), 404, "not_found"),
    "archive of no job": (lambda http: http.get(f"/jobs/{'0' * 28}/archive"), 404, "not_found"),
    "report of no job": (lambda http: http.get(f"/jobs/{'0' * 28}/report"), 404, "not_found"),
    "unknown status": (lambda http: http.get("/jobs?status=odd"), 400, "malformed"),
    "malformed label": (lambda http: http.get("/jobs?label=odd"), 400, "malformed"),
    "limit out of range": (lambda http: http.get("/jobs?limit=0"), 400, "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_every_refusal_has_one_shape(service: Service, case: str) -> None:
    send, status, code = REQUESTS[case]
    with service.http as http:
        assert_problem(send(http), status, code)


def test_a_file_that_is_not_in_the_manifest_is_not_served(service: Service) -> None:
    job = service.finished(service.submit(tiny_recipe("a", name="average")))
    for name in ("none.json", "../../redis/redis.conf", "%2e%2e/%2e%2e/redis/redis.conf", "models", "/etc/passwd"):
        response = service.get(f"/jobs/{job['id']}/artifacts/{name}")
        assert response.status_code == 404, name
        assert response.headers["Content-Type"] == "application/problem+json"


def test_nothing_of_the_rows_is_in_the_log(service: Service) -> None:
    rows = (service.inputs / "rows" / "a.jsonl").read_text().splitlines()
    assert not [
        row for row in rows if len(json.loads(row)["text"].split()) > 2 and json.loads(row)["text"] in service.log
    ]
