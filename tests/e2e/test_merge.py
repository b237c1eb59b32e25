"""The main job over HTTP, on the running service."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.client import Client
from tests.conftest import Service, assert_tells_no_paths, keeps_within, tiny_recipe, wait_until
from tests.tiny import LAYERS, Tensors, read_model, write_rows
from worker.engine.catalog.methods import METHODS
from worker.engine.catalog.methods.parameters import MOST_AUTO_EXAMPLES


@pytest.fixture(scope="module")
def job(service: Service) -> dict[str, Any]:
    """A succeeded merge of two tiny experts with different label sets."""
    recipe = {**tiny_recipe("a", "b"), "name": "two", "labels": {"team": "search"}}
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    return job


def test_nothing_that_a_job_makes_or_tells_holds_a_path_of_the_machine(service: Service, job: dict[str, Any]) -> None:
    made = service.get(f"/jobs/{job['id']}/archive").content
    for folder in (service.data_dir, service.inputs, tempfile.gettempdir(), sys.prefix):
        assert str(folder).encode() not in made
    for path in (f"/jobs/{job['id']}", f"/jobs/{job['id']}/events", f"/jobs/{job['id']}/artifacts", "/openapi.json"):
        assert_tells_no_paths(service.get(path).text)


def test_a_merge_is_accepted_with_its_location(service: Service) -> None:
    response = service.post("/merge", json=tiny_recipe())
    assert response.status_code == 202
    job = response.json()
    assert response.headers["Location"] == f"/jobs/{job['id']}" == job["links"]["self"]
    assert job["status"] == "queued"
    assert job["name"] == "a+b"
    assert service.finished(job["id"])["status"] == "succeeded"


def test_the_result_has_every_field_of_the_contract(job: dict[str, Any]) -> None:
    result = job["result"]
    assert set(result) == {
        "models", "metrics", "mean_retention", "min_retention", "method", "candidates", "accepted", "search",
        "stopping", "timings", "peak_memory_bytes", "device", "notes", "published",
    }  # fmt: skip
    assert [model["name"] for model in result["models"]] == ["a", "b"]
    assert sum(model["weight_share"] for model in result["models"]) == pytest.approx(1)
    assert all(model["examples"] == 64 for model in result["models"])
    assert all(0 < model["weight_error"] < 0.5 for model in result["models"])
    assert result["method"]["estimator"] == "expected"
    assert (result["stopping"]["tolerance"], result["stopping"]["reached"]) == (None, None)
    assert [look["examples"] for look in result["stopping"]["curve"]] == [64]
    assert set(result["metrics"]) == {"a", "b"}
    for metric in result["metrics"].values():
        assert metric["metric"] == "accuracy"
        assert metric["interval"][0] <= metric["merged"] <= metric["interval"][1]
        assert metric["retention"] == pytest.approx(metric["merged"] / metric["expert"])
        assert set(metric["intervals"]) == {"expert", "average", "merged_kept_head", "merged"}
        assert set(metric["differences"]) == {"expert", "average", "merged_kept_head"}
    assert result["timings"]["score_seconds"] > 0
    assert result["peak_memory_bytes"] > 100_000_000
    assert job["progress"] == {
        "phase": "done", "done": 1, "total": 1, "unit": "jobs", "fraction": 1.0, "eta_seconds": 0.0, "models": {},
    }  # fmt: skip


def test_the_request_is_shown_with_its_defaults_filled_in(job: dict[str, Any]) -> None:
    assert job["request"]["method"]["normalize"] == "layer"
    assert job["request"]["models"][0]["evaluation"]["metric"] == "accuracy"
    assert job["request"]["models"][0]["weight"] == 1.0


def test_the_artifact_is_complete_and_its_digests_hold(service: Service, job: dict[str, Any]) -> None:
    listing = service.get(job["links"]["artifacts"]).json()
    names = {file["name"] for file in listing["files"]}
    assert names >= {
        "recipe.json", "manifest.json", "README.md", "report.json", "report.html",
        "scores/a.safetensors", "scores/b.safetensors",
    }  # fmt: skip
    for file in listing["files"]:
        content = service.get(file["href"]).content
        assert len(content) == file["bytes"], file["name"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"], file["name"]


def test_downloaded_models_load_and_give_the_logits_of_the_merge(
    service: Service, job: dict[str, Any], tiny_inputs: Path, tmp_path: Path
) -> None:
    with Client(f"http://127.0.0.1:{service.port}") as client:
        client.download(job["id"], tmp_path)
    merged = {}
    for name in ("a", "b"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "models" / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / name)
        logits = model(**tokenizer(["one two three", "four"], padding=True, return_tensors="pt")).logits
        assert logits.shape == (2, {"a": 2, "b": 3}[name])
        assert torch.isfinite(logits).all()
        merged[name] = model.state_dict()
        expert = AutoModelForSequenceClassification.from_pretrained(tiny_inputs / "checkpoints" / name)
        aligned = not torch.equal(merged[name]["classifier.weight"], expert.state_dict()["classifier.weight"])
        assert aligned == bool(job["result"]["models"][name == "b"]["aligned_examples"]) is True
    for key in merged["a"]:
        if not key.startswith("classifier"):
            assert torch.equal(merged["a"][key], merged["b"][key]), key


def test_the_recipe_in_the_artifact_makes_the_same_tensors_again(service: Service, job: dict[str, Any]) -> None:
    recipe = service.get(f"/jobs/{job['id']}/artifacts/recipe.json").json()
    again = service.finished(service.submit(recipe))
    first, second = (
        {f["name"]: f["sha256"] for f in service.get(f"/jobs/{j['id']}/artifacts").json()["files"]}
        for j in (job, again)
    )
    assert {n: d for n, d in first.items() if n.endswith(".safetensors")} == {
        n: d for n, d in second.items() if n.endswith(".safetensors")
    }


def test_scores_are_published_with_their_standard_errors(service: Service, job: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    path.write_bytes(service.get(f"/jobs/{job['id']}/artifacts/scores/a.safetensors").content)
    scores = load_file(path)
    assert {"layers.0.heads", "layers.0.heads.stderr", "layers.1.neurons", "layers.1.neurons.stderr"} <= set(scores)
    assert all(tensor.dtype == torch.float64 for tensor in scores.values())
    assert all((tensor >= 0).all() for tensor in scores.values())


def test_the_archive_streams_the_whole_artifact(service: Service, job: dict[str, Any], tmp_path: Path) -> None:
    response = service.get(f"/jobs/{job['id']}/archive")
    assert len(response.content) == int(response.headers["Content-Length"])
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    for file in service.get(job["links"]["artifacts"]).json()["files"]:
        assert hashlib.sha256((tmp_path / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    shards = [next((tmp_path / "models" / name).glob("model-00001*")) for name in ("a", "b")]
    assert shards[0].stat().st_ino == shards[1].stat().st_ino


def test_gnu_tar_takes_the_archive(service: Service, job: dict[str, Any], tmp_path: Path) -> None:
    content = service.get(f"/jobs/{job['id']}/archive").content
    subprocess.run(["tar", "-x"], input=content, cwd=tmp_path, check=True)
    assert (tmp_path / "models" / "a" / "config.json").is_file()


def test_files_answer_ranges_and_conditions(service: Service, job: dict[str, Any]) -> None:
    path = f"/jobs/{job['id']}/artifacts/models/a/config.json"
    whole = service.get(path)
    etag = whole.headers["ETag"]
    assert whole.headers["Repr-Digest"].startswith("sha-256=:")
    assert whole.headers["Content-Disposition"] == 'attachment; filename="config.json"'
    part = service.get(path, headers={"Range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, whole.content[2:6])
    assert part.headers["Content-Range"] == f"bytes 2-5/{len(whole.content)}"
    assert service.get(path, headers={"Range": "bytes=2-5", "If-Range": etag}).status_code == 206
    assert service.get(path, headers={"Range": "bytes=2-5", "If-Range": '"other"'}).status_code == 200
    assert service.get(path, headers={"If-None-Match": etag}).status_code == 304
    with service.http as http:
        head = http.head(path)
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(whole.content)))
    beyond = service.get(path, headers={"Range": "bytes=999999999-"})
    assert beyond.status_code == 416
    assert beyond.headers["Content-Type"] == "application/problem+json"


def downloaded_backbone(service: Service, job: dict[str, Any], folder: Path) -> Tensors:
    with Client(f"http://127.0.0.1:{service.port}") as client:
        client.download(job["id"], folder)
    tensors = read_model(folder / "models" / "a")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}


def test_statistics_of_an_earlier_merge_are_used_again_and_heads_are_kept_when_asked(
    service: Service, job: dict[str, Any]
) -> None:
    recipe = {**tiny_recipe("a", "b"), "output": {"align_heads": False}}
    again = service.finished(service.submit(recipe))["result"]
    assert [model["score_cached"] for model in again["models"]] == [True, True]
    assert [model["aligned_examples"] for model in again["models"]] == [0, 0]
    for name, metric in again["metrics"].items():
        assert metric["merged"] == metric["merged_kept_head"] == job["result"]["metrics"][name]["merged_kept_head"]
    other = service.finished(service.submit(tiny_recipe("a", "b", examples=63)))["result"]
    assert [model["score_cached"] for model in other["models"]] == [False, False]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "passthrough"])
def test_every_method_merges_by_its_defaults(service: Service, method: str) -> None:
    few = {"examples": 60} if "dataset" in METHODS[method].needs else {}
    models = ["a", "b", "grade"][: METHODS[method].models[1]]
    recipe = {**tiny_recipe(*models, name=method, **few), "base": "local:checkpoints/base"}
    plan = service.post("/merge/validate", json=recipe).json()
    assert [model["name"] for model in plan["models"]] == models
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    result = job["result"]
    assert result["method"]["name"] == method
    assert all(
        (model["examples"] > 0) == bool(METHODS[method].parameters(name=method).statistics)
        for model in result["models"]
    )
    assert all(model["aligned_examples"] > 0 for model in result["models"])
    shares = [model["weight_share"] for model in result["models"]]
    if method in ("model_stock", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion"):
        assert shares == [None] * len(models), "the data decide"
    else:
        assert sum(shares) == pytest.approx(1)


def test_a_merge_may_go_beyond_or_stay_short_of_the_models_seen_from_the_base(
    service: Service, tiny_inputs: Path, tmp_path: Path
) -> None:
    base = read_model(tiny_inputs / "checkpoints" / "base")
    found = {}
    for scale in (1.0, 0.0, 2.0):
        recipe = {**tiny_recipe("a", "b", name="average", scale=scale), "base": "local:checkpoints/base"}
        job = service.finished(service.submit(recipe))
        assert job["status"] == "succeeded", job["error"]
        found[scale] = downloaded_backbone(service, job, tmp_path / str(scale))
        manifest = json.loads((tmp_path / str(scale) / "manifest.json").read_text())
        assert manifest["base"]["checkpoint"] == "local:checkpoints/base"
        assert manifest["base"]["digest"].startswith("sha256:")
    for name, average in found[1.0].items():
        ancestor = base[name.removeprefix("bert.")]
        torch.testing.assert_close(found[0.0][name], ancestor, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[2.0][name], 2 * average - ancestor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", [None, "spearman"])
def test_a_regressor_and_a_classifier_merge(service: Service, metric: str | None) -> None:
    recipe = tiny_recipe("a", "grade")
    if metric:
        recipe["models"][1]["evaluation"]["metric"] = metric
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    metrics = job["result"]["metrics"]
    assert [metrics[name]["metric"] for name in ("a", "grade")] == ["accuracy", metric or "pearson"]
    assert all(-1 <= metrics["grade"][key] <= 1 for key in ("expert", "average", "merged"))


def test_an_unchanged_job_answers_304(service: Service, job: dict[str, Any]) -> None:
    first = service.get(job["links"]["self"])
    again = service.get(job["links"]["self"], headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert service.get(job["links"]["self"], headers={"If-None-Match": '"older"'}).status_code == 200


def test_jobs_are_found_by_status_and_label(service: Service, job: dict[str, Any]) -> None:
    found = service.get("/jobs", params={"label": "team:search", "status": "succeeded"}).json()
    assert job["id"] in [entry["id"] for entry in found["data"]]
    assert all(entry["labels"] == {"team": "search"} for entry in found["data"])
    assert service.get("/jobs", params={"label": "team:other"}).json() == {"data": [], "next": None}


def test_pages_of_jobs_follow_each_other(service: Service, job: dict[str, Any]) -> None:
    newest = service.finished(service.submit(tiny_recipe("a", name="average")))
    with Client(service.url) as client:
        everything = [entry.id for entry in client.jobs(page_size=100)]  # other tests of this service have made many
        paged = [entry.id for entry in client.jobs(page_size=7)]
    assert paged == everything == sorted(everything, reverse=True)
    assert everything[0] == newest["id"]
    assert job["id"] in everything
    single = service.get("/jobs", params={"limit": 1}).json()
    follows = service.get("/jobs", params={"limit": 1, "after": single["next"]}).json()
    assert [entry["id"] for page in (single, follows) for entry in page["data"]] == everything[:2]


def test_the_report_page_shows_the_metrics(service: Service, job: dict[str, Any]) -> None:
    response = service.get(job["links"]["report"])
    assert response.headers["Content-Type"].startswith("text/html")
    assert f"{job['result']['metrics']['a']['merged']:.4f}" in response.text


def test_scoring_stops_when_the_merge_weights_are_known(service: Service, tiny_inputs: Path) -> None:
    recipe = tiny_recipe("a", "b", examples="auto", tolerance=0.5)
    write_rows(tiny_inputs / "rows" / "more.jsonl", count=600, labels=2)
    recipe["models"][0]["dataset"]["source"] = "local:rows/more.jsonl"
    assert service.post("/merge/validate", json=recipe).json()["examples"] == 2 * MOST_AUTO_EXAMPLES
    job_id = service.submit(recipe)
    seen = [0.0]

    def watch() -> bool:
        job = service.job(job_id)
        seen.append(job["progress"]["fraction"])
        return bool(job["finished_at"])

    wait_until(watch, "the job to end", interval_s=0.02)
    job = service.job(job_id)
    assert job["status"] == "succeeded", job["error"]
    assert seen == sorted(seen)
    result = job["result"]
    assert [model["examples"] for model in result["models"]] == [256, 200]
    assert (result["stopping"]["tolerance"], result["stopping"]["reached"]) == (0.5, True)
    (look,) = result["stopping"]["curve"]
    assert look["examples"] == 256
    assert 0 < look["error"] <= 0.5
    assert set(look["errors"]) == {f"layers.{i}.{kind}" for i in range(LAYERS) for kind in ("heads", "neurons")}
    report = service.get(job["links"]["report"]).text
    assert "How well the merge weights are known" in report
    assert f"{look['error']:.4f}" in report


def test_validate_answers_with_the_plan_and_queues_nothing(service: Service) -> None:
    before = service.get("/jobs").json()["data"][0]["id"]
    response = service.post("/merge/validate", json=tiny_recipe("a", "b", "c"))
    assert response.status_code == 200
    plan = response.json()
    assert plan["examples"] == 3 * 64
    assert plan["bytes_to_read"] > plan["bytes_to_write"] > 0
    assert plan["owners"]["heads"] == 2 * 7  # per layer: query, key, value with their biases, output projection
    assert plan["owners"]["neurons"] == 2 * 3
    assert [model["task"] for model in plan["models"]] == [f"classification, {n} outputs" for n in (2, 3, 2)]
    assert service.get("/jobs").json()["data"][0]["id"] == before


def test_an_idempotency_key_makes_one_job(service: Service) -> None:
    headers = {"Idempotency-Key": "exactly once"}
    recipe = tiny_recipe("a", name="average")
    first = service.post("/merge", json=recipe, headers=headers)
    again = service.post("/merge", json=recipe, headers=headers)
    assert again.status_code == 202
    assert again.json()["id"] == first.json()["id"]
    other = service.post("/merge", json=tiny_recipe("b", name="average"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    service.finished(first.json()["id"])


def test_methods_describe_their_parameters(service: Service) -> None:
    methods = {entry["name"]: entry for entry in service.get("/methods").json()["data"]}
    assert set(methods) == {*METHODS, "auto"}
    assert methods["auto"]["needs"] == ["evaluation"]
    assert methods["slerp"]["search"] == {"t": {"low": 0.2, "high": 0.8, "log": False}}
    assert methods["mask_fisher"]["search"]["rest"] == {"values": ["uniform", "model"]}
    assert methods["slerp"]["models"] == {"least": 2, "most": 2}
    assert methods["average"]["models"] == {"least": 1, "most": None}
    floor = methods["mask_fisher"]["parameters"]["properties"]["floor"]
    assert floor["default"] == 0.001
    assert "description" in floor
    assert "2403.09891" in methods["mask_fisher"]["source"]


def test_an_idle_warm_worker_starts_within_a_tenth_of_a_second(service: Service) -> None:
    def wait_s() -> float:
        job = service.finished(service.submit(tiny_recipe("a", name="average")))
        return float(job["result"]["timings"]["queue_seconds"])

    wait_s()
    keeps_within(0.1, lambda: sorted(wait_s() for _ in range(5))[2])


def test_progress_never_falls_and_names_its_phase(service: Service) -> None:
    job_id = service.submit(tiny_recipe("a", "b", "c", examples=200))
    seen: list[tuple[str, float]] = []

    def watch() -> bool:
        job = service.job(job_id)
        seen.append((job["progress"]["phase"], job["progress"]["fraction"]))
        return bool(job["finished_at"])

    wait_until(watch, "the job to end", interval_s=0.02)
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    phases = {"queued", "loading", "scoring", "merging", "aligning", "evaluating", "comparing", "publishing", "done"}
    assert phases >= {phase for phase, _ in seen}


def test_health_readiness_and_documentation_answer(service: Service) -> None:
    assert service.get("/healthz").json() == {"status": "ok"}
    assert service.get("/readyz").json() == {"status": "ready", "workers": 1}
    assert service.get("/openapi.json").json()["info"]["title"] == "maskmerge"
    assert service.get("/docs").status_code == 200


def test_the_worker_and_the_api_are_light_and_only_the_engine_holds_torch(service: Service) -> None:
    processes = service.processes()
    for role in ("api", "worker"):
        assert processes[role].memory_info().rss < 150_000_000
    mapped = {
        role: any("torch" in m.path for m in processes[role].memory_maps()) for role in ("api", "worker", "engine")
    }
    assert mapped == {"api": False, "worker": False, "engine": True}


def test_no_password_is_in_any_command_line(service: Service) -> None:
    password = (service.data_dir / "redis" / "redis.conf").read_text().split("requirepass ")[1].split()[0]
    for process in service.processes().values():
        assert password not in " ".join(process.cmdline())
    assert password not in service.log
    assert (service.data_dir / "redis" / "redis.conf").stat().st_mode & 0o077 == 0
    assert json.dumps(password) not in service.get("/jobs").text


def test_regmean_estimates_what_it_reads_where_no_model_has_rows(service: Service) -> None:
    asked = tiny_recipe("a", "b", name="regmean", gram="deltas")
    for model in asked["models"]:
        del model["dataset"]
    asked["base"] = "local:checkpoints/base"
    plan = service.post("/merge/validate", json=asked).json()
    job = service.finished(service.submit(asked))
    assert job["status"] == "succeeded", job["error"]
    doubt = "Gram matrices of the inputs of linear layers were not measured, but estimated from the task vectors"
    assert plan["notes"][0] == job["result"]["notes"][0] == doubt
    assert [model["examples"] for model in job["result"]["models"]] == [plan["examples"], 0] == [0, 0]
    asked["slices"] = [{"sources": [{"model": "a", "layers": [0, 1]}, {"model": "b", "layers": [1, 2]}]}]
    assert "merges whole models" in service.post("/merge/validate", json=asked).json()["detail"]


def test_esm_reads_rows_and_base_and_is_refused_without_either(service: Service) -> None:
    asked = tiny_recipe("a", "b", name="esm", examples=32)
    detail = service.post("/merge", json=asked).json()["detail"]
    assert "method esm merges differences from the common ancestor; name it as base" in detail
    asked["base"] = "local:checkpoints/base"
    job = service.finished(service.submit(asked))
    assert job["status"] == "succeeded", job["error"]
    assert [model["examples"] for model in job["result"]["models"]] == [32, 32]
    del asked["models"][0]["dataset"]
    assert "model 'a' has no dataset, and method esm" in service.post("/merge", json=asked).json()["detail"]
    asked["method"]["rank"] = 0
    assert "method.rank" in service.post("/merge", json=asked).text
