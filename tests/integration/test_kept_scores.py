"""Kept statistics: merges that find them compute nothing, and the API reads them while workers write and remove."""

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import SecretStr
from safetensors.torch import load
from transformers import BertForSequenceClassification

from app.contracts.settings import Settings
from app.main import create_app
from app.storage.statistics.folder import StatisticsFolder
from tests.conftest import BASE_URL, HERE
from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, tiny_texts, write_lines, write_rows
from tests.tiny_families import DECODERS
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MANIFEST, MergeResult
from worker.engine.catalog.contracts.spec import EvaluationSpec, MergeSpec, ModelSpec, ScoreSpec, StoreSpec
from worker.engine.catalog.contracts.statistics import ABOUT, FOLDER, PREDICTIONS, About, Facts, Origin, Tokens
from worker.engine.catalog.methods import GRAM
from worker.engine.checkpoints import reloading
from worker.engine.checkpoints.reader import Digests
from worker.engine.inputs.examples import plan_batches
from worker.engine.jobs.context import EngineState, job_context
from worker.engine.jobs.engine import Engine
from worker.engine.jobs.merge import load as load_inputs
from worker.engine.jobs.merge import measure_all
from worker.engine.jobs.merge import merge as merge_job
from worker.engine.models.loading import ModelCache
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.store import StatisticsStore

CPU = torch.device("cpu")
TOKENS = Tokens(tokenizer="3", inputs=["input_ids"], max_length=128, versions={"tokenizers": "1"})
FACTS = Facts(statistic=GRAM, checkpoint=f"sha256:{'1' * 64}", rows="2", tokens=TOKENS, precision="float32")
ORIGIN = Origin(checkpoint="local:expert", dataset="local:rows.jsonl", examples=7)
PARTS = [{"layers.0.heads": torch.eye(3)}, {"pooler": torch.ones(2)}]


@contextmanager
def counting_forward_passes() -> Iterator[Callable[[], int]]:
    """How many forward passes of any module there were."""
    count = 0

    def forward(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = torch.nn.modules.module.register_module_forward_hook(forward)
    try:
        yield lambda: count
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "method",
    [
        "mask_fisher",
        pytest.param("fisher", marks=pytest.mark.long),
        "regmean",
        pytest.param("mask_regmean", marks=pytest.mark.long),
    ],
)
def test_a_merge_of_scored_models_runs_no_forward_pass(
    tiny_inputs: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three models are scored, two in one job and one in another; a control without their statistics runs passes."""
    monkeypatch.setattr(reloading, "RUN_BYTES", 0)  # else the merge is run once before it is published
    store = StoreSpec(folder=tmp_path / "store", max_bytes=10**9)
    models = [model_spec(tiny_inputs / "checkpoints" / name, tiny_inputs / "rows" / f"{name}.jsonl") for name in "abc"]
    few = {"name": method, "examples": 40}

    def merge(name: str, store: StoreSpec) -> MergeSpec:
        spec = merge_spec(tmp_path / name, models, few, align_heads=False)
        return spec.model_copy(update={"store": store})

    with counting_forward_passes() as passes:
        for name, chosen in (("two", models[:2]), ("one", models[2:])):
            spec = ScoreSpec.model_validate(
                {
                    "name": name,
                    "models": chosen,
                    "method": {"precision": "float32", **few},
                    "recipe": {},
                    "folder": tmp_path / name,
                    "store": store,
                }
            )
            scored = Engine(CPU).score(spec, silent)
            assert [model.score_cached for model in scored.models] == [False] * len(chosen)
        to_score = passes()
        assert to_score > 0
        merged = Engine(CPU).merge(merge("merged", store), silent)
        assert passes() == to_score
        assert [model.score_cached for model in merged.models] == [True] * 3
        control = Engine(CPU).merge(merge("control", StoreSpec(folder=tmp_path / "empty", max_bytes=10**9)), silent)
        assert passes() == 2 * to_score
        assert [model.score_cached for model in control.models] == [False] * 3
    for file in (tmp_path / "control" / "models").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "merged" / file.relative_to(tmp_path / "control")).read_bytes()


def classifiers(inputs: Path, folder: Path) -> list[ModelSpec]:
    def evaluation(name: str) -> EvaluationSpec:
        rows = write_rows(folder / f"{name}.jsonl", count=70, labels={"a": 2, "b": 3}[name], seed=9)
        return EvaluationSpec(source=f"{name} anew", path=rows, label="label", metric="accuracy")

    return [
        model_spec(inputs / "checkpoints" / name, inputs / "rows" / f"{name}.jsonl", evaluation=evaluation(name))
        for name in "ab"
    ]


def writers(inputs: Path, folder: Path) -> list[ModelSpec]:
    """Language models, of which one is judged by what it writes; the answer is empty, so it is right."""
    texts = tiny_texts(24, longest=12)
    rows = write_lines(folder / "rows.jsonl", [json.dumps({"text": text, "target": text[:20]}) for text in texts])
    spec = {"source": "rows", "path": rows, "target": "target"}
    evaluations = {
        "ll": EvaluationSpec.model_validate({**spec, "metric": "perplexity"}),
        "written": EvaluationSpec.model_validate(
            {**spec, "metric": "exact_match", "max_new_tokens": 4, "answer": "x?"}
        ),
    }
    return [
        model_spec(
            tiny_checkpoint(folder / name, family=DECODERS["llama"], seed=seed, task="CausalLM"), evaluation=evaluation
        )
        for seed, (name, evaluation) in enumerate(evaluations.items(), 1)
    ]


def test_nothing_is_kept_of_a_file_that_was_written_to_after_it_was_digested(tiny_inputs: Path, tmp_path: Path) -> None:
    """Its digest would find numbers of other weights, also after the file is as it was, and for other tenants."""
    models = classifiers(tiny_inputs, tmp_path)
    own = shutil.copytree(models[1].path or tmp_path, tmp_path / "own")
    models[1] = models[1].model_copy(update={"path": own})
    file = own / "model.safetensors"
    before, times = file.read_bytes(), file.stat()
    header = 8 + int.from_bytes(before[:8], "little")

    def merge(folder: str, store: str, change: Callable[..., None]) -> MergeResult:
        spec = merge_spec(tmp_path / folder, models, {"name": "regmean", "examples": 20}, evaluate=True)
        spec = spec.model_copy(update={"store": StoreSpec(folder=tmp_path / store, max_bytes=10**9)})
        return Engine(CPU).merge(spec, change)

    def change(phase: str, *_: object) -> None:
        if phase == "scoring" and file.read_bytes() == before:
            with file.open("r+b") as stream:
                stream.seek(header)
                stream.write(bytes(len(before) - header))
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    merge("changed", "kept", change)
    assert file.read_bytes() != before
    file.write_bytes(before)
    after, anew = merge("after", "kept", silent), merge("anew", "empty", silent)
    assert after.metrics == anew.metrics
    assert [model.score_cached for model in after.models] == [False, False]


@pytest.mark.parametrize("models_of", [classifiers, writers])
@pytest.mark.parametrize("searches", [pytest.param(False, marks=pytest.mark.long), True])
def test_no_expert_runs_again_for_another_merge(
    tiny_inputs: Path, tmp_path: Path, models_of: Callable[[Path, Path], list[ModelSpec]], searches: bool
) -> None:
    """What it gave for alignment, search and evaluation is found; the result is the same to the bit as without."""
    models = models_of(tiny_inputs, tmp_path)
    backbones: set[torch.nn.Module] = set()
    passes = 0

    def forward(module: torch.nn.Module, *_: object) -> None:
        nonlocal passes
        passes += module in backbones

    def merge(method: dict[str, Any], folder: Path, store: str) -> tuple[MergeResult, int, tuple[Any, ...]]:
        nonlocal passes
        aligned = models_of is classifiers
        if searches:
            method = {"name": "auto", "candidates": [method], "trials": 3}
        spec = merge_spec(folder, models, method, evaluate=True, align_heads=aligned)
        spec = spec.model_copy(update={"store": StoreSpec(folder=tmp_path / store, max_bytes=10**9)})
        lasting = EngineState(CPU, ModelCache(CPU), BatchSizes(), Digests())
        seen: list[Any] = []
        with job_context(spec, lasting, lambda *progress: seen.append(progress)) as context:
            experts = [lasting.models.get(inspect_checkpoint(m.path, m.source)).model for m in models if m.path]
            backbones.clear()
            backbones.update(dict(expert.named_modules())[expert.base_model_prefix] for expert in experts)
            passes = 0
            result = merge_job(spec, context)
        return result, passes, seen[-1]

    handle = torch.nn.modules.module.register_module_forward_hook(forward)
    try:
        _, first, _ = merge({"name": "linear"}, tmp_path / "first", "kept")
        again, found, ended = merge({"name": "average"}, tmp_path / "again", "kept")
        anew, control, ended_anew = merge({"name": "average"}, tmp_path / "anew", "empty")
    finally:
        handle.remove()
    assert found == 0
    assert first == control > 0
    assert ended == ended_anew
    assert ended[1] == ended[2]
    assert again.metrics == anew.metrics
    assert again.candidates == anew.candidates
    for file in (tmp_path / "anew").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "anew")).read_bytes()


@pytest.mark.parametrize("candidates", [["regmean", "mask_fisher"], ["mask_fisher", "fisher"]])
def test_candidates_share_passes_over_the_same_rows(tiny_inputs: Path, tmp_path: Path, candidates: list[str]) -> None:
    """Scores and Gram matrices take one pass together, whichever comes first; Fisher information one for each row."""
    rows = 40
    models = [model_spec(tiny_inputs / "checkpoints" / name, tiny_inputs / "rows" / f"{name}.jsonl") for name in "ab"]
    auto = {"name": "auto", "candidates": candidates, "examples": rows}
    passes, seen = 0, list[Any]()

    def begin(module: torch.nn.Module, _: object) -> None:
        nonlocal passes
        passes += isinstance(module, BertForSequenceClassification)

    lasting = EngineState(CPU, ModelCache(CPU), BatchSizes(), Digests())
    spec = merge_spec(tmp_path / "out", models, auto, align_heads=False)
    with job_context(spec, lasting, lambda *progress: seen.append(progress)) as context:
        loaded = load_inputs(spec, context)
        samples = [model.rows.sample for model in loaded.models if model.rows.sample is not None]
        batches = sum(len(plan_batches(block)) for sample in samples for block in sample.blocks(0, rows))
        handle = torch.nn.modules.module.register_module_forward_pre_hook(begin)
        by_method = measure_all(spec, loaded, context)
        handle.remove()
    assert passes == batches + ("fisher" in candidates) * rows * len(models)
    assert [set(of_method[0].measured.statistics) for of_method in by_method] == [
        set(method.statistics) for method in spec.method.methods
    ]
    assert seen[-1][:4] == ("scoring", 2 * rows * len(models), 2 * rows * len(models), "examples")


# --- the API's side


@pytest.fixture
def api(redis_url: str, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(redis_url=SecretStr(redis_url), data_dir=tmp_path)
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StatisticsStore]:
    with StatisticsStore(tmp_path / FOLDER, 10**9) as store:
        yield store


def numbered(number: int) -> Facts:
    return FACTS.model_copy(update={"seed": number})


def listed(api: TestClient) -> list[str]:
    response = api.get("/scores")
    assert response.status_code == 200, response.text
    return [entry["digest"] for entry in response.json()["data"]]


def test_nothing_is_listed_before_anything_is_kept(api: TestClient) -> None:
    assert api.get("/scores").json() == {"data": [], "next": None}
    assert api.get(f"/scores/{FACTS.address}").json()["code"] == "not_found"


def test_a_statistic_of_several_parts_is_a_tar_of_them(api: TestClient, store: StatisticsStore) -> None:
    store.put(FACTS, ORIGIN, PARTS)
    response = api.get(f"/scores/{FACTS.address}")
    assert response.headers["Content-Type"] == "application/x-tar"
    assert response.headers["Content-Disposition"] == f'attachment; filename="gram-{FACTS.address[:12]}.tar"'
    assert len(response.content) == int(response.headers["Content-Length"])
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        parts = [load(file.read()) for member in archive if (file := archive.extractfile(member))]
    assert [set(part) for part in parts] == [{"layers.0.heads"}, {"pooler"}]
    assert torch.equal(parts[0]["layers.0.heads"], torch.eye(3))
    head = api.head(f"/scores/{FACTS.address}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == response.headers["Content-Length"]


def test_outputs_of_experts_are_listed_by_their_kind(store: StatisticsStore, api: TestClient) -> None:
    predicted = FACTS.model_copy(update={"statistic": PREDICTIONS, "hardware": {"device": "cpu AVX2"}})
    for facts in (FACTS, predicted):
        store.put(facts, ORIGIN, PARTS)
    [entry] = api.get("/scores", params={"statistic": "predictions"}).json()["data"]
    assert (entry["digest"], entry["statistic"]) == (predicted.address, "predictions")
    assert len(api.get("/scores").json()["data"]) == 2


def test_what_is_being_sent_stays_whole_when_it_is_removed(tmp_path: Path, store: StatisticsStore) -> None:
    store.put(FACTS, ORIGIN, PARTS)
    kept = StatisticsFolder(tmp_path / FOLDER).get(FACTS.address)
    whole = [(kept.path / file.name).read_bytes() for file in kept.about.files]
    files, held = kept.open()
    shutil.rmtree(kept.path)
    with held:
        assert [file.path.read_bytes() for file in files] == whole
    assert not any(file.path.exists() for file in files)
    with pytest.raises(FileNotFoundError):
        kept.open()
    assert kept.used_at() is None


def test_what_vanishes_while_it_is_listed_is_left_out(tmp_path: Path, store: StatisticsStore, api: TestClient) -> None:
    for number in range(3):
        store.put(numbered(number), ORIGIN, PARTS)
    newest = StatisticsFolder(tmp_path / FOLDER).newest()
    first = next(newest)
    shutil.rmtree(tmp_path / FOLDER / numbered(1).address)
    rest = list(newest)
    assert [first.address, *(kept.address for kept in rest)] == [numbered(n).address for n in (2, 1, 0)]
    assert [kept.used_at() is None for kept in rest] == [True, False]
    assert listed(api) == [numbered(2).address, numbered(0).address]


def test_only_what_a_worker_has_kept_is_listed(tmp_path: Path, store: StatisticsStore, api: TestClient) -> None:
    store.put(FACTS, ORIGIN, PARTS)
    folder = tmp_path / FOLDER
    (folder / ("0" * 64)).write_text("no folder")
    (folder / ("1" * 64)).mkdir()
    for number, content in enumerate(("{", '{"facts": {}, "sha256": {}}'), start=2):
        (folder / (str(number) * 64)).mkdir()
        (folder / (str(number) * 64) / ABOUT).write_text(content)
    (folder / ".assembled-1").mkdir()
    assert listed(api) == [FACTS.address]
    for name in ("0", "1", "2", "3"):
        assert api.get(f"/scores/{name * 64}").json()["code"] == "not_found"


def test_what_was_measured_again_is_listed_as_it_is_now(api: TestClient, store: StatisticsStore) -> None:
    store.put(FACTS, ORIGIN, PARTS)
    assert api.get("/scores").json()["data"][0]["source"] == "local:expert"
    shutil.rmtree(store.folder / FACTS.address)
    store.put(FACTS, ORIGIN.model_copy(update={"checkpoint": "local:other"}), PARTS)
    assert api.get("/scores").json()["data"][0]["source"] == "local:other"


MANY = 10_000


@pytest.mark.long
def test_ten_thousand_are_listed_soon(tmp_path: Path, api: TestClient, store: StatisticsStore) -> None:
    about = store.put(FACTS, ORIGIN, PARTS).about
    for number in range(MANY - 1):
        facts = FACTS.model_copy(update={"seed": number, "checkpoint": f"sha256:{number % 100:064}"})
        another = About(
            facts=facts, origin=ORIGIN, files=about.files, created_at=about.created_at + timedelta(seconds=number + 1)
        )
        entry = store.folder / facts.address
        entry.mkdir()
        (entry / ABOUT).write_text(another.model_dump_json())
    seconds = []
    for query in ({}, {}, {"checkpoint": f"{7:064}", "limit": "100"}):
        start = time.process_time()  # of the API too, which runs in this process
        page = api.get("/scores", params=query).json()
        seconds.append(time.process_time() - start)
    assert [entry["seed"] % 100 for entry in page["data"]] == [7] * 100
    assert seconds[0] < 10
    assert max(seconds[1:]) < 1


def test_the_manifest_says_what_the_same_bits_need(tiny_inputs: Path, tmp_path: Path) -> None:
    """A merge whose tokens of a batch were found by trying, and another elsewhere that names their number."""
    models = [model_spec(tiny_inputs / "checkpoints" / name, tiny_inputs / "rows" / f"{name}.jsonl") for name in "ab"]

    def merged(name: str, **method: Any) -> tuple[dict[str, Any], Path]:
        spec = merge_spec(tmp_path / name, models, {"name": "mask_fisher", "examples": 40, **method}, align_heads=False)
        result = Engine(CPU).merge(spec, silent)
        manifest = json.loads((tmp_path / name / MANIFEST).read_text())
        assert [m.batch_tokens for m in result.models] == [m["batch_tokens"] for m in manifest["inputs"].values()]
        return manifest, tmp_path / name

    manifest, first = merged("first")
    assert manifest["threads"] == torch.get_num_threads()
    assert manifest["device"] == "cpu"
    [tokens] = {model["batch_tokens"] for model in manifest["inputs"].values()}
    again, second = merged("second", batch_tokens=tokens)
    other, third = merged("third", batch_tokens=64)
    assert {model["batch_tokens"] for model in other["inputs"].values()} == {64}
    for path in sorted((first / "scores").iterdir()):
        assert path.read_bytes() == (second / "scores" / path.name).read_bytes()
        assert path.read_bytes() != (third / "scores" / path.name).read_bytes()
    assert [f for f in again["files"] if f["name"].endswith("safetensors")] == [
        f for f in manifest["files"] if f["name"].endswith("safetensors")
    ]


def test_tokens_of_a_batch_are_those_that_were_asked_for_whatever_is_kept(tiny_inputs: Path, tmp_path: Path) -> None:
    """What another job kept by a larger number, perhaps on a larger machine, is no reason to compute by it here."""
    store = StoreSpec(folder=tmp_path / "store", max_bytes=10**9)
    rows = write_rows(tmp_path / "rows.jsonl", count=600)
    models = [model_spec(tiny_inputs / "checkpoints" / "a", rows)]

    def scored(name: str, examples: int, **method: Any) -> tuple[int | None, bool]:
        asked = {"name": "mask_fisher", "examples": examples, **method}
        spec = merge_spec(tmp_path / name, models, asked, align_heads=False)
        spec = spec.model_copy(update={"store": store})
        [model] = Engine(CPU).merge(spec, silent).models
        return model.batch_tokens, model.score_cached

    assert scored("large", 256, batch_tokens=100_000) == (100_000, False)
    assert scored("same", 256) == (100_000, True)
    assert scored("on", 512) == (
        None,
        False,
    )  # parts differ: the plan did not count that many
    assert scored("named", 600, batch_tokens=64) == (64, False)
    assert scored("again", 256, batch_tokens=100_000) == (100_000, True)
