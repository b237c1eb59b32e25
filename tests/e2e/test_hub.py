"""Checkpoints and data sets from a hub: pinned, downloaded, refused, cancelled; and no call where none is named."""

import html
import json
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from app.contracts.requests import as_recipe
from tests.conftest import (
    Service,
    assert_problem,
    free_port,
    keeps_within,
    make_service,
    tiny_recipe,
    wait_until,
)
from tests.hub import Hub
from tests.tiny import edit_json, read_model, tiny_base, tiny_checkpoint, tiny_texts, write_lines
from tests.tiny_adapters import merged_by_peft, tiny_adapter
from tests.tiny_families import TINY_BERT, TINY_VISION

CANCEL_S = 5
NAMES = ["bad", "good"]


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    """An address that nobody should call."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, listener: socket.socket) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    hub = Hub(free_port())
    hub.add("model", "org/a", tiny_checkpoint(root / "a", seed=1, names=NAMES))
    hub.add("model", "org/b", tiny_checkpoint(root / "b", labels=3, seed=2), private=True)
    fisher = {key: tensor.square() for key, tensor in load_file(root / "a" / "model.safetensors").items()}
    (root / "fisher").mkdir()
    save_file(fisher, root / "fisher" / "model.safetensors")
    hub.add("model", "org/fisher", root / "fisher")
    hub.add("model", "org/large", tiny_checkpoint(root / "large", seed=3, hidden=1024))
    hub.add("model", "org/base", tiny_base(root / "base"))
    hub.add("model", "org/lora", tiny_adapter(root / "lora", root / "base", seed=5))
    folder = tiny_checkpoint(root / "pickle", seed=4)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.add("model", "org/pickle", folder)
    folder = tiny_checkpoint(root / "code", seed=4)
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoModel": "evil.Model"})
    hub.add("model", "org/code", folder)
    folder = tiny_checkpoint(root / "header", seed=4)
    (folder / "model.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
    hub.add("model", "org/header", folder)

    # As data sets of the hub are: several configurations, Parquet, labels with names (in an order of their own).
    glue = root / "glue"
    labels = datasets.ClassLabel(names=NAMES[::-1])
    features = datasets.Features({"first": datasets.Value("string"), "second": datasets.Value("string"), "y": labels})
    for split, count in (("train", 120), ("validation", 40)):
        columns = {
            "first": tiny_texts(count, 1, 12),
            "second": tiny_texts(count, 2, 12),
            "y": [i % 2 for i in range(count)],
        }
        (glue / "pairs").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(glue / "pairs" / f"{split}-00000.parquet")
    write_lines(glue / "README.md", CARD.splitlines())
    hub.add("dataset", "org/glue", glue)
    private = root / "private"
    write_lines(private / "train.csv", ["text,label", *(f"{text},{i % 3}" for i, text in enumerate(TEXTS))])
    hub.add("dataset", "org/private", private, private=True)
    for name, start in {"outside": "---\n", "outside-later": "\n---\n", "outside-longer": "---\n---x: 1\n"}.items():
        write_lines(root / name / "train.csv", ["text,label", "one,0"])
        card = start + OUTSIDE.format(url=f"ftp://127.0.0.1:{listener.getsockname()[1]}/secret.csv")
        write_lines(root / name / "README.md", card.splitlines())
        hub.add("dataset", f"org/{name}", root / name)
    for name, data_files in {"typo": "nope.jsonl", "number": "5", "root": "/etc/passwd"}.items():
        write_lines(root / name / "train.csv", ["text,label", "one,0"])
        card = "---\n" + OUTSIDE.format(url=data_files)
        write_lines(root / name / "README.md", card.splitlines())
        hub.add("dataset", f"org/{name}", root / name)
    for name, content in TABLES_OF_TEXT.items():
        write_lines(root / name / f"train.{name.partition('-')[0]}", content)
        hub.add("dataset", f"org/{name}", root / name)
    multi_hot = {"text": tiny_texts(8, 9), "label": [[1, 1, 0]] * 4 + [[0, 0, 0]] * 4}
    datasets.Dataset.from_dict(multi_hot).to_parquet(root / "lists" / "train.parquet")
    hub.add("dataset", "org/lists", root / "lists")
    several = tiny_checkpoint(
        root / "several", names=["a", "b", "c"], problem_type="multi_label_classification", seed=6
    )
    hub.add("model", "org/several", several)
    (root / "empty").mkdir()
    hub.add("dataset", "org/empty", root / "empty")
    write_lines(root / "nothing" / "train.jsonl", [])
    hub.add("dataset", "org/nothing", root / "nothing")
    broken = root / "broken"
    write_lines(broken / "train.jsonl", ['{"text": "a secret row", "label": 0}', '{"text": "a secret row" oops'])
    hub.add("dataset", "org/broken", broken)
    script = root / "script"
    write_lines(script / "script.py", ["raise SystemExit('it ran')"])
    hub.add("dataset", "org/script", script)
    with hub.serving():
        yield hub


TABLES_OF_TEXT = {
    "tsv-quotes": ["text\tlabel", '"one two\t0', 'three" four\t1', "five\t0"],
    "csv-joined": ["text,label", '"one two,0', 'three four",1', "five,0", "six,1"],
    "csv-short": ["text,label", "one,0", "two", "three,1"],
    "csv-shifted": ["text,label", "one,two,0", "three,four,1"],
}
TEXTS = ["NA", *tiny_texts(60, 5)]
CARD = """---
configs:
- config_name: pairs
  data_files:
  - split: train
    path: pairs/train-*
  - split: validation
    path: pairs/validation-*
- config_name: lines
  data_files: pairs/train-*
---
"""
OUTSIDE = """configs:
- config_name: default
  data_files:
  - split: train
    path: {url}
---
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path, hub: Hub) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("service")
    service = make_service(
        root,
        tiny_inputs,
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT=hub.endpoint,
        HF_HOME=str(root / "hf"),
        HF_TOKEN=hub.token,
    )
    service.start()
    yield service
    assert service.stop() == 0


def recipe(**changes: Any) -> dict[str, Any]:
    """A merge of two models from the hub on data sets from the hub, with the value at each dotted path replaced."""
    found: dict[str, Any] = {
        "method": {"name": "mask_fisher", "examples": 64, "precision": "float32"},
        "models": [
            {
                "name": "a",
                "checkpoint": "hf:org/a",
                "dataset": {
                    "source": "hf:org/glue",
                    "config": "pairs",
                    "split": "train",
                    "text": "first",
                    "text_pair": "second",
                    "label": "y",
                },
                "evaluation": {
                    "source": "hf:Org/GLUE@main",  # the hub takes names in any case
                    "config": "pairs",
                    "split": "validation",
                    "text": "first",
                    "label": "y",
                    "limit": 30,
                },
            },
            {
                "name": "b",
                "checkpoint": "hf:org/b@main",
                "dataset": {"source": "hf:org/private", "label": "label"},
            },
        ],
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = found
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    return found


@pytest.mark.long
def test_statistics_of_a_repository_are_read_at_its_commit(service: Service, hub: Hub) -> None:
    asked = recipe(method={"name": "fisher", "examples": 8})
    asked["models"] = [asked["models"][0], {**asked["models"][1], "checkpoint": "hf:org/a"}]
    del asked["models"][0]["dataset"]
    asked["models"][0]["statistics"] = {"fisher": "hf:org/fisher"}
    asked["models"][1]["dataset"] = recipe()["models"][0]["dataset"]
    job = service.finished(service.submit({**asked, "evaluate": False}))
    assert job["status"] == "succeeded", job["error"]
    source = job["request"]["models"][0]["statistics"]["fisher"]
    assert len(source) == len("hf:org/fisher@") + 40
    assert job["result"]["models"][0]["statistics"]["fisher"]["source"] == source
    assert [model["examples"] for model in job["result"]["models"]] == [0, 8]


def test_a_merge_that_names_no_hub_asks_none(service: Service, hub: Hub) -> None:
    before = len(hub.requests)
    assert service.finished(service.submit(tiny_recipe()))["status"] == "succeeded"
    assert hub.requests[before:] == []


def test_vocabularies_of_the_hub_are_aligned_before_a_job_is_accepted(service: Service) -> None:
    response = service.post("/merge/validate", json=recipe(output={"vocabulary": "union"}))
    assert response.status_code == 200, response.text
    plan = response.json()
    assert [(model["tokens"], model["new_tokens"]) for model in plan["models"]] == [(plan["tokens"], 0)] * 2


def test_models_and_data_sets_of_the_hub_are_merged_at_the_commit_of_the_request(
    service: Service, hub: Hub, tmp_path: Path
) -> None:
    response = service.post("/merge", json=recipe())
    assert response.status_code == 202, response.text
    a, b, glue = (hub.repositories[key] for key in (("model", "org/a"), ("model", "org/b"), ("dataset", "org/glue")))
    accepted = response.json()["request"]["models"]
    assert [model["checkpoint"] for model in accepted] == [f"hf:org/a@{a.newest}", f"hf:org/b@{b.newest}"]
    assert accepted[0]["dataset"]["source"] == accepted[0]["evaluation"]["source"] == f"hf:org/glue@{glue.newest}"
    job = service.finished(response.json()["id"])
    assert job["status"] == "succeeded", job["error"]
    assert [model["commit"] for model in job["result"]["models"]] == [a.newest, b.newest]
    assert [model["examples"] for model in job["result"]["models"]] == [64, 61]
    assert job["result"]["metrics"]["a"]["examples"] == 30
    assert any("ids 0 to 1 are the checkpoint's 1, 0" in note for note in job["result"]["notes"])
    names = {file["name"] for file in service.get(job["links"]["artifacts"]).json()["files"]}
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(service.get(f"{job['links']['artifacts']}/{name}").content)
    assert json.loads((tmp_path / "recipe.json").read_text()) == as_recipe(job["request"])
    card = (tmp_path / "README.md").read_text()
    assert "base_model:\n- org/a\n- org/b\nbase_model_relation: merge\n" in card
    assert all(" ".join(note.split()) in html.unescape(card) for note in job["result"]["notes"])
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "models" / "b")
    again = service.finished(service.submit(job["request"]))
    assert [m["weight_share"] for m in again["result"]["models"]] == [
        m["weight_share"] for m in job["result"]["models"]
    ]


def test_a_checkpoint_of_the_hub_merges_as_the_same_folder_does(service: Service, hub: Hub, tmp_path: Path) -> None:
    folder = service.inputs / "checkpoints" / "from-hub"
    if not folder.exists():
        shutil.copytree(hub.repositories["model", "org/a"].commits[hub.repositories["model", "org/a"].newest], folder)
    remote = {"method": {"name": "average"}, "models": [{"name": "a", "checkpoint": "hf:org/a"}]}
    local = {"method": {"name": "average"}, "models": [{"name": "a", "checkpoint": "local:checkpoints/from-hub"}]}
    merged = []
    for number, asked in enumerate((remote, local)):
        job = service.finished(service.submit(asked))
        assert job["status"] == "succeeded", job["error"]
        artifact = next((service.data_dir / "artifacts").glob(f"{job['id']}.*"))
        merged.append(read_model(artifact / "models" / "a"))
        assert job["result"]["models"][0]["digest"].startswith("sha256:"), number
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_files_one_folder_deep_come_from_the_hub_too(service: Service, hub: Hub, tmp_path: Path) -> None:
    """Modules of an embedding model, with their weights, and further chat templates."""
    names = ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    modules = "sentence_transformers.models"
    for seed, name in enumerate("ab", 1):
        folder = tiny_base(tmp_path / name, base_seed=seed)
        TINY_BERT.tokenizer().save_pretrained(folder)
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
        entries = [{"idx": i, "name": str(i), "path": p, "type": f"{modules}.{kinds[p]}"} for i, p in enumerate(kinds)]
        for inner in ("1_Pooling", "2_Dense", "additional_chat_templates", "onnx"):
            (folder / inner).mkdir()
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 16, "pooling_mode": "cls"}')
        (folder / "2_Dense" / "config.json").write_text('{"in_features": 16, "out_features": 2}')
        dense = {"linear.weight": torch.full((2, 16), float(seed)), "linear.bias": torch.zeros(2)}
        save_file(dense, folder / "2_Dense" / "model.safetensors")
        (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
        (folder / "onnx" / "model.onnx").write_bytes(b"not asked for")
        hub.add("model", f"org/embedding-{name}", folder)
    before = len(hub.requests)
    models = [{"name": name, "checkpoint": f"hf:org/embedding-{name}"} for name in "ab"]
    asked = {"method": {"name": "average"}, "models": models}
    plan = service.post("/merge/validate", json=asked).json()
    job = service.finished(service.submit(asked))
    assert (job["status"], job["result"]["notes"]) == ("succeeded", []), job
    published = next((service.data_dir / "artifacts").glob(f"{job['id']}.*")) / "model"
    for name in (*names[1:3], "additional_chat_templates/rag.jinja"):
        assert (published / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert json.loads((published / "modules.json").read_text()) == entries
    assert load_file(published / names[3])["linear.weight"].unique().tolist() == [1.5]
    copied = ["tokenizer.json", "tokenizer_config.json", "additional_chat_templates/rag.jinja", *names[1:3]]
    weights = [*read_model(published).values(), *load_file(published / names[3]).values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    assert plan["bytes_to_write"] == size + sum((published / name).stat().st_size for name in copied)
    assert not [asked for asked in hub.requests[before:] if "onnx" in asked]


def test_an_adapter_of_the_hub_is_merged_into_its_base(service: Service, hub: Hub) -> None:
    asked = {
        "method": {"name": "average"},
        "models": [{"name": "lora", "checkpoint": "hf:org/lora"}],
        "base": "hf:org/base",
    }
    response = service.post("/merge", json=asked)
    assert response.status_code == 202, response.text
    lora, base = (hub.repositories["model", name] for name in ("org/lora", "org/base"))
    accepted = response.json()["request"]
    assert [accepted["models"][0]["checkpoint"], accepted["base"]] == [
        f"hf:org/lora@{lora.newest}",
        f"hf:org/base@{base.newest}",
    ]
    job = service.finished(response.json()["id"])
    assert job["status"] == "succeeded", job["error"]
    found = read_model(next((service.data_dir / "artifacts").glob(f"{job['id']}.*")) / "models" / "lora")
    whole = AutoModelForSequenceClassification.from_pretrained(base.commits[base.newest])
    expected = dict(merged_by_peft(whole, lora.commits[lora.newest]).named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=1e-6)
    del asked["base"]
    refused = service.post("/merge", json=asked)
    assert_problem(refused, 422, "invalid_checkpoint")
    assert "name that as base" in refused.json()["detail"]


def test_what_is_pushed_after_the_request_does_not_count(service: Service, hub: Hub, tmp_path: Path) -> None:
    moving = hub.add("model", "org/moving", tiny_checkpoint(tmp_path / "old", seed=11))
    old = moving.newest
    blocker = service.submit(tiny_recipe("a", "b", "c", examples=200))
    waiting = service.submit({"method": {"name": "average"}, "models": [{"name": "m", "checkpoint": "hf:org/moving"}]})
    new = moving.push(tiny_checkpoint(tmp_path / "new", seed=12))
    assert service.finished(blocker)["status"] == "succeeded"
    job = service.finished(waiting)
    assert job["result"]["models"][0]["commit"] == old != new
    artifact = next((service.data_dir / "artifacts").glob(f"{waiting}.*"))
    expected, found = read_model(tmp_path / "old"), read_model(artifact / "models" / "m")
    assert all(torch.equal(expected[name], found[name]) for name in found)


@pytest.mark.long
def test_a_download_shows_its_bytes_and_can_be_cancelled(service: Service, hub: Hub) -> None:
    large = {"method": {"name": "average"}, "models": [{"name": "large", "checkpoint": "hf:org/large"}]}
    folder = hub.repositories["model", "org/large"].commits[hub.repositories["model", "org/large"].newest]
    size = sum(file.stat().st_size for file in folder.iterdir())
    cancelled: list[str] = []

    def cancel() -> float:
        job_id = service.submit(large)
        progress = wait_until(
            lambda: (p := service.job(job_id)["progress"])["phase"] == "downloading" and p["done"] > size / 50 and p,
            "the download to be seen",
        )
        assert (progress["total"], progress["unit"]) == (size, "bytes")
        assert 0 < progress["done"] < size
        asked = time.monotonic()
        assert service.post(f"/jobs/{job_id}/cancel").status_code == 202
        assert service.finished(job_id)["status"] == "cancelled"
        cancelled.append(job_id)
        return time.monotonic() - asked

    hub.bytes_per_second = size / 12
    try:
        keeps_within(CANCEL_S, cancel)
    finally:
        hub.bytes_per_second = None
    assert service.post(f"/jobs/{cancelled[0]}/retry").status_code == 202
    assert service.finished(cancelled[0])["status"] == "succeeded"


REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "no such model": (
        recipe(models__0__checkpoint="hf:org/none"), "invalid_request", ["models.0.checkpoint", "not on the hub"],
    ),
    "no such revision": (
        recipe(models__0__checkpoint="hf:org/a@v9"), "invalid_request", ["hf:org/a@v9", "not on the hub"],
    ),
    "no such data set": (
        recipe(models__0__dataset__source="hf:org/none"), "invalid_request",
        ["models.0.dataset.source", "not on the hub"],
    ),
    "no name": (recipe(models__0__checkpoint="hf:a/b/c"), "invalid_request", ["write hf:ORG/NAME"]),
    "a path": (recipe(models__0__checkpoint="hf:../../etc"), "invalid_request", ["write hf:ORG/NAME"]),
    "a parent folder": (recipe(models__0__checkpoint="hf:org/..@main"), "invalid_request", ["write hf:ORG/NAME"]),
    "pickle": (
        recipe(models__0__checkpoint="hf:org/pickle"), "invalid_checkpoint",
        ["pytorch_model.bin", "save_pretrained('OUT')"],
    ),
    "code": (recipe(models__0__checkpoint="hf:org/code"), "invalid_checkpoint", ["auto_map"]),
    "huge header": (
        recipe(models__0__checkpoint="hf:org/header"), "invalid_checkpoint", ["a header of 1000000000000 bytes"],
    ),
    "another width": (recipe(models__0__checkpoint="hf:org/large"), "incompatible_checkpoints", ["hidden_size"]),
    "label names": (
        recipe(models__0__evaluation__label_names=["bad", "goood"]), "invalid_dataset",
        ["models.0.evaluation.label_names", "'goood'", "did you mean 'good'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_shows_at_once_is_refused_at_the_door(service: Service, case: str) -> None:
    asked, code, says = REFUSED[case]
    response = service.post("/merge", json=asked)
    assert (response.status_code, response.json()["code"]) == (422, code), response.text
    assert not [words for words in says if words not in response.text], response.text


FAILING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown configuration": (recipe(models__0__dataset__config="pears"), ["'pears'", "'pairs'"]),
    "no configuration": (recipe(models__0__dataset__config=None), ["Config name is missing", "'pairs', 'lines'"]),
    "unknown split": (recipe(models__0__dataset__split="test"), ['split "test"', "'train', 'validation'"]),
    "no split": (recipe(models__0__dataset__split=None), ["the splits train, validation"]),
    "unknown column": (recipe(models__0__dataset__text="frist"), ["no column 'frist'", "did you mean 'first'?"]),
    "a column of numbers": (recipe(models__0__dataset__text="y"), ["row ", "column 'y' is not text"]),
    "data outside the repository": (
        recipe(models__1__dataset__source="hf:org/outside"),
        ["hf:org/outside", "Protocol not known: ftp"],
    ),
    "rows that cannot be read": (recipe(models__1__dataset__source="hf:org/broken"), ["cannot be read as json"]),
    "files that are not there": (
        recipe(models__1__dataset={"source": "hf:org/typo"}),
        ["hf:org/typo", "finds no rows"],
    ),
    "a number for files": (recipe(models__1__dataset={"source": "hf:org/number"}), ["hf:org/number"]),
    "files of this machine": (recipe(models__1__dataset={"source": "hf:org/root"}), ["hf:org/root"]),
    "an empty repository": (recipe(models__1__dataset={"source": "hf:org/empty"}), ["hf:org/empty"]),
    "an empty file": (recipe(models__1__dataset={"source": "hf:org/nothing"}), ["hf:org/nothing"]),
    "a script": (recipe(models__1__dataset={"source": "hf:org/script"}), ["hf:org/script"]),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_only_the_data_shows_fails_the_job(service: Service, case: str) -> None:
    asked, says = FAILING[case]
    job = service.finished(service.submit(asked))
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_dataset"), job["error"]
    assert not [words for words in says if words not in job["error"]["message"]], job["error"]["message"]
    assert "it ran" not in service.log
    assert "a secret row" not in service.log + job["error"]["message"]


@pytest.mark.parametrize(
    ("name", "model", "rows", "says"),
    [
        ("tsv-quotes", "a", 3, []),
        ("lists", "several", 8, []),
        ("csv-joined", "a", 3, ["train.csv", "1 rows", "2 lines", "with a quote too few"]),
        ("csv-short", "a", None, ["row 2", "the row has no label"]),
        ("csv-shifted", "a", None, ["more fields than its header"]),
    ],
)
def test_rows_of_the_hub_are_those_of_its_lines_or_it_is_said(
    service: Service, name: str, model: str, rows: int | None, says: list[str]
) -> None:
    evaluation = {"source": f"hf:org/{name}", "label": "label"}
    asked = {"name": model, "checkpoint": f"hf:org/{model}", "evaluation": evaluation}
    job = service.finished(service.submit({"method": {"name": "average"}, "models": [asked]}))
    if rows is None:
        assert job["error"]["code"] == "invalid_dataset", job
        said = job["error"]["message"]
    else:
        assert job["status"] == "succeeded", job["error"]
        assert job["result"]["metrics"][model]["examples"] == rows
        said = "; ".join(job["result"]["notes"])
    assert (f"org/{name}" in said) == bool(says), said
    assert not [words for words in says if words not in said], said


@pytest.mark.parametrize("name", ["outside", "outside-later", "outside-longer"])
def test_no_address_that_a_data_set_names_is_called(service: Service, listener: socket.socket, name: str) -> None:
    job = service.finished(service.submit(recipe(models__1__dataset__source=f"hf:org/{name}")))
    with pytest.raises(BlockingIOError):  # nobody is waiting to be accepted
        listener.accept()
    if name != "outside-longer":  # whose card is none to the library, so its file is found by name
        assert (job["status"], job["error"]["code"]) == ("failed", "invalid_dataset"), job["error"]


@pytest.mark.parametrize(
    "name", ["org/name.git", "-org/name", "org/a--b", "org/.x", "org/x.", "./x", f"org/{'x' * 200}"], ids=str
)
def test_a_name_that_no_repository_has_is_refused_by_its_field(service: Service, name: str) -> None:
    for asked in (recipe(models__0__checkpoint=f"hf:{name}"), recipe(models__0__dataset__source=f"hf:{name}")):
        assert_problem(service.post("/merge", json=asked), 422, "invalid_request")


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ((403, b"{}"), 422, "invalid_request"),
        ((401, b"{}"), 422, "invalid_request"),
        ((200, b"<html>log in first</html>"), 503, "hub_unavailable"),
        ((200, b"[]"), 503, "hub_unavailable"),
        ((200, b'{"id": "org/a", "sha": 5}'), 503, "hub_unavailable"),
        ((500, b"oops"), 503, "hub_unavailable"),
    ],
)
def test_whatever_the_hub_answers_the_request_gets_a_problem_that_says_so(
    service: Service, hub: Hub, answer: tuple[int, bytes], status: int, code: str
) -> None:
    hub.answer = answer
    try:
        response = service.post("/merge", json=recipe())
    finally:
        hub.answer = None
    assert_problem(response, status, code)


@pytest.mark.long
def test_parquet_of_equal_texts_is_not_decoded_to_the_disk(service: Service, hub: Hub, tmp_path: Path) -> None:
    """Two files of a few kB, which the hub's library decodes to 400 MB."""
    for part in (0, 1):
        indices = pyarrow.array([0] * 2000, pyarrow.int32())
        texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["one two " * 12_500]))
        table = pyarrow.table({"text": texts, "label": pyarrow.array([part] * 2000)})
        (tmp_path / "equal").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "equal" / f"train-{part}.parquet", store_schema=False)
    hub.add("dataset", "org/equal", tmp_path / "equal")
    columns = {"text": "text", "text_pair": None, "config": None, "split": None, "label": "label"}
    asked = recipe(
        models__0__evaluation={"source": "hf:org/equal", **columns, "limit": 200},
        models__0__dataset={"source": "hf:org/equal", **columns, "limit": 8},
    )
    before = _bytes_below(Path(service.environment["HF_HOME"]))
    job = service.finished(service.submit(asked))
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["metrics"]["a"]["examples"] == 200
    of_part = recipe(
        models__0__evaluation={"source": "hf:org/equal", **columns, "split": "train[1990:2050]"},
        models__0__dataset={"source": "hf:org/equal", **columns, "limit": 8},
    )
    job = service.finished(service.submit(of_part))
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["metrics"]["a"]["examples"] == 60
    assert _bytes_below(Path(service.environment["HF_HOME"])) - before < 1_000_000


PICTURES = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': dog
          '1': cat
---
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, hub: Hub, tiny_inputs: Path) -> Mapping[str, Any]:
    """A merge of two models on images; their labels have the data set's names in the other order."""
    root = tmp_path_factory.mktemp("pictures")
    images = [
        PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8))
        for seed in range(40)
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(40)]}, features)
    for name in ("described", "bare"):
        (root / name).mkdir()
        table.to_parquet(root / name / "train-00000.parquet")
        hub.add("dataset", f"org/{name}", root / name)
    write_lines(root / "described" / "README.md", PICTURES.splitlines())
    for label in ("dog", "cat"):
        (root / "folders" / "train" / label).mkdir(parents=True)
    for place, image in enumerate(images):
        image.save(root / "folders" / "train" / ("dog", "cat")[place % 2] / f"{place:02}.png")
    hub.add("dataset", "org/folders", root / "folders")
    (root / "broken" / "train" / "cat").mkdir(parents=True)
    images[0].save(root / "broken" / "train" / "cat" / "1.png")
    (root / "broken" / "train" / "cat" / "2.png").write_bytes(b"no image")
    hub.add("dataset", "org/broken-images", root / "broken")
    (root / "documented").mkdir()
    images[0].save(root / "documented" / "1.png")
    write_lines(root / "documented" / "metadata.jsonl", [json.dumps({"file_name": "1.png", "label": 0})])
    hub.add("dataset", "org/documented", root / "documented")
    models = []
    for seed in (1, 2):
        folder = tiny_inputs / "checkpoints" / f"pictures-{seed}"
        tiny_checkpoint(folder, family=TINY_VISION["vit"], seed=seed, names=["cat", "dog"], task="ImageClassification")
        models.append({"name": f"m{seed}", "checkpoint": f"local:checkpoints/pictures-{seed}"})
    return {"method": {"name": "mask_fisher", "examples": 20, "estimator": "empirical"}, "models": models}


def of_pictures(pictures: Mapping[str, Any], source: str) -> dict[str, Any]:
    rows = {"source": source, "label": "label"}
    return {**pictures, "models": [{**model, "dataset": rows, "evaluation": rows} for model in pictures["models"]]}


def test_images_of_the_hub_are_read_however_it_stores_them(service: Service, pictures: Mapping[str, Any]) -> None:
    """In Parquet, described or not, and as a folder for each label; the same rows in another order."""
    found = []
    for name in ("described", "bare", "folders"):
        job = service.finished(service.submit(of_pictures(pictures, f"hf:org/{name}")))
        assert job["status"] == "succeeded", job["error"]
        found.append({name: metric["expert"] for name, metric in job["result"]["metrics"].items()})
        assert {metric["examples"] for metric in job["result"]["metrics"].values()} == {40}
    assert found[0] == found[1] == found[2]
    assert len({*found[0].values()} - {0.5}) > 0, "labels in the other order would show"


@pytest.mark.parametrize(
    ("source", "changes", "says"),
    [
        ("broken-images", {"label": None}, "row 2: column 'image' is no image of a known format"),
        ("folders", {"split": "test"}, "has the splits train; name one as split"),
        ("documented", {}, "is a folder of images with metadata.jsonl, which is none; store images and columns"),
    ],
)
def test_images_of_the_hub_that_cannot_be_read_fail_the_job_by_their_row(
    service: Service, pictures: Mapping[str, Any], source: str, changes: dict[str, Any], says: str
) -> None:
    asked = of_pictures(pictures, f"hf:org/{source}")
    for model in asked["models"]:
        model["dataset"] = {**model["dataset"], **changes}
        del model["evaluation"]
    job = service.finished(service.submit({**asked, "method": {"name": "regmean", "examples": 20}}))
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_dataset")
    assert says in job["error"]["message"]


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.long
def test_while_the_hub_is_away_nothing_is_accepted_and_what_waits_can_be_tried_again(
    service: Service, hub: Hub, tmp_path: Path
) -> None:
    hub.add("model", "org/late", tiny_checkpoint(tmp_path / "late", seed=21))
    asked = {"method": {"name": "average"}, "models": [{"name": "late", "checkpoint": "hf:org/late"}]}
    blocker = service.submit(tiny_recipe("a", "b", "c", examples=200))
    waiting = service.submit(asked)
    hub.is_down = True
    try:
        before = len(service.get("/jobs?limit=100").json()["data"])
        response = service.post("/merge", json=asked)
        assert (response.status_code, response.json()["code"]) == (503, "hub_unavailable")
        assert response.headers["Retry-After"]
        assert len(service.get("/jobs?limit=100").json()["data"]) == before
        service.finished(blocker)
        job = service.finished(waiting)
    finally:
        hub.is_down = False
    assert (job["status"], job["error"]["code"], job["error"]["retryable"]) == ("failed", "storage_error", True)
    assert "hf:org/late" in job["error"]["message"]
    assert service.post(f"/jobs/{waiting}/retry").status_code == 202
    assert service.finished(waiting)["status"] == "succeeded"


def test_the_token_is_in_no_log_and_in_no_command_line(service: Service, hub: Hub) -> None:
    assert hub.token not in service.log
    for process in service.processes().values():
        assert not [word for word in process.cmdline() if hub.token in word]
