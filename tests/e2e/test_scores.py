"""Scores over HTTP: computed without a merge, listed, downloaded, and found by merges."""

import hashlib
import io
import signal
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load

from app.client import Client
from tests.conftest import (
    Service,
    assert_problem,
    keeps_within,
    make_service,
    measured_anew,
    tiny_recipe,
    wait_until,
)
from tests.tiny import edit_tensors, tiny_checkpoint, write_rows
from tests.tiny_families import TINY_FAMILIES
from worker.engine.scoring.sample import looks

CANCEL_S = 5
Recipe = dict[str, Any]


def score_recipe(*names: str, **method: Any) -> Recipe:
    """Scores of tiny checkpoints, measured anew."""
    recipe = tiny_recipe(*names, **method)
    for model in recipe["models"]:
        del model["evaluation"]
    return measured_anew(recipe)


def submit(service: Service, recipe: Recipe) -> str:
    with Client(f"http://127.0.0.1:{service.port}") as client:
        job_id: str = client.submit_scores(recipe).id
    return job_id


def scored(service: Service, recipe: Recipe) -> dict[str, Any]:
    job = service.finished(submit(service, recipe))
    assert job["status"] == "succeeded", job["error"]
    return job


@pytest.fixture(scope="module")
def job(service: Service) -> dict[str, Any]:
    """Two scored experts."""
    return scored(service, {**score_recipe("a", "b"), "labels": {"team": "scores"}})


@pytest.fixture(scope="module")
def other_family(tiny_inputs: Path) -> str:
    """An expert that cannot be merged with the others."""
    tiny_checkpoint(tiny_inputs / "checkpoints" / "roberta", family=TINY_FAMILIES["roberta"])
    write_rows(tiny_inputs / "rows" / "roberta.jsonl", count=50)
    return "roberta"


def test_scores_are_accepted_as_a_job_of_their_kind(service: Service) -> None:
    recipe = score_recipe("a")
    response = service.post("/scores", json=recipe, headers={"Idempotency-Key": "scores-1"})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["Location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["name"], job["status"]) == ("scores", "a", "queued")
    again = service.post("/scores", json=recipe, headers={"Idempotency-Key": "scores-1"})
    assert again.json()["id"] == job["id"]
    merge = service.post("/merge", json=recipe, headers={"Idempotency-Key": "scores-1"})
    assert_problem(merge, 422, "idempotency_mismatch")
    assert service.finished(job["id"])["status"] == "succeeded"


def test_an_answer_may_wait_for_the_end(service: Service) -> None:
    response = service.post("/scores", json=score_recipe("a"), headers={"Prefer": "wait=60"})
    assert response.headers["Preference-Applied"] == "wait=60"
    assert response.json()["status"] == "succeeded"


def test_the_result_says_what_was_measured_and_where_it_is_kept(service: Service, job: dict[str, Any]) -> None:
    result = job["result"]
    assert set(result) == {"models", "method", "timings", "peak_memory_bytes", "device", "notes"}
    assert result["method"]["estimator"] == "expected"
    assert result["timings"]["score_seconds"] > 0
    for model, name in zip(result["models"], ("a", "b"), strict=True):
        assert set(model) == {
            "name", "checkpoint", "commit", "digest", "examples", "batch_tokens", "estimator", "score_seconds",
            "score_cached", "stopping", "scores", "license",
        }  # fmt: skip
        assert (model["name"], model["checkpoint"]) == (name, f"local:checkpoints/{name}")
        assert (model["examples"], model["estimator"], model["score_cached"]) == (64, "expected", False)
        [kept] = model["scores"]
        assert kept["href"] == f"/scores/{kept['digest']}"
        assert kept["statistic"] == "mask_fisher"
        assert len(service.get(kept["href"]).content) == kept["bytes"]
    assert '"status":"succeeded"' in service.get(f"/jobs/{job['id']}/events").text


def test_scores_are_published_as_those_of_a_merge_are(service: Service, job: dict[str, Any], tmp_path: Path) -> None:
    with Client(f"http://127.0.0.1:{service.port}") as client:
        client.download(job["id"], tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "recipe.json", "report.json", "report.html", "manifest.json", "scores/a.safetensors", "scores/b.safetensors",
    }  # fmt: skip
    merge = service.finished(service.submit({**job["request"], "evaluate": False}))
    assert [model["score_cached"] for model in merge["result"]["models"]] == [True, True]
    with tarfile.open(fileobj=io.BytesIO(service.get(f"/jobs/{job['id']}/archive").content)) as archive:
        assert set(archive.getnames()) == names
    for name in ("a", "b"):
        path = f"artifacts/scores/{name}.safetensors"
        of_merge = service.get(f"/jobs/{merge['id']}/{path}")
        assert of_merge.content == (tmp_path / "scores" / f"{name}.safetensors").read_bytes()
    assert "What was measured" in service.get(job["links"]["report"]).text
    recipe = service.get(f"/jobs/{job['id']}/artifacts/recipe.json").json()
    again = scored(service, recipe)["result"]["models"]
    assert [model["score_cached"] for model in again] == [True, True]
    assert [model["scores"] for model in again] == [model["scores"] for model in job["result"]["models"]]


def test_each_model_is_scored_until_it_is_known_by_itself(service: Service) -> None:
    [model] = scored(service, score_recipe("a", examples="auto", tolerance=0.5))["result"]["models"]
    assert model["examples"] == 200
    assert (model["stopping"]["tolerance"], model["stopping"]["reached"]) == (0.5, True)
    [look] = model["stopping"]["curve"]
    assert look["examples"] == 200


def test_models_need_not_fit_each_other(service: Service, other_family: str) -> None:
    recipe = score_recipe("a", other_family)
    assert_problem(service.post("/merge", json={**recipe, "evaluate": False}), 422, "incompatible_checkpoints")
    models = scored(service, recipe)["result"]["models"]
    for model in models:
        content = service.get(model["scores"][0]["href"]).content
        assert {"layers.0.heads", "layers.1.neurons"} <= set(load(content))


@pytest.mark.parametrize(
    ("method", "statistics", "estimator"),
    [
        ({"name": "mask_fisher", "preset": "paper"}, ["mask_fisher"], "empirical"),
        ({"name": "fisher", "estimator": "sampled", "seed": 5}, ["fisher"], "sampled"),
        ({"name": "regmean"}, ["gram"], None),
        ({"name": "mask_regmean"}, ["gram", "mask_fisher"], "expected"),
        ({"name": "aligned_regmean"}, ["gram"], None),
    ],
    ids=str,
)
def test_every_measuring_method_has_statistics(
    service: Service, method: Recipe, statistics: list[str], estimator: str | None
) -> None:
    [model] = scored(service, score_recipe("a", **{"examples": 32, **method}))["result"]["models"]
    assert [kept["statistic"] for kept in model["scores"]] == statistics
    assert model["estimator"] == estimator
    for kept in model["scores"]:
        listed = service.get("/scores", params={"checkpoint": model["digest"], "statistic": kept["statistic"]}).json()
        [entry] = [entry for entry in listed["data"] if entry["digest"] == kept["digest"]]
        assert (entry["bytes"], entry["href"], entry["examples"]) == (kept["bytes"], kept["href"], 32)
        assert entry["seed"] == (5 if estimator == "sampled" else None)


@pytest.mark.parametrize("name", ["average", "ties", "task_arithmetic"])
def test_a_method_that_measures_nothing_is_refused(service: Service, name: str) -> None:
    response = service.post("/scores", json=score_recipe("a", name=name))
    assert_problem(response, 422, "invalid_request")
    body = response.json()
    assert body["errors"][0]["field"] == "method"
    assert f"method {name} measures nothing of a model; methods that do are mask_fisher" in body["detail"]


def changed(**models: Any) -> Recipe:
    recipe = score_recipe("a", "b")
    recipe["models"][0].update(models)
    return recipe


@pytest.mark.parametrize(
    ("recipe", "code", "field"),
    [
        ({**score_recipe("a"), "output": {}}, "invalid_request", ""),
        (changed(weight=1.0), "invalid_request", "models.0"),
        (changed(dataset=None), "invalid_request", "models.0.dataset"),
        (changed(name="b"), "invalid_request", ""),
        (changed(name=".."), "invalid_request", "models.0.name"),
        (changed(checkpoint="local:none"), "invalid_request", "models.0.checkpoint"),
        (changed(checkpoint="local:rows"), "invalid_checkpoint", "models.0.checkpoint"),
        (changed(checkpoint="local:checkpoints/base"), "invalid_checkpoint", "models.0.checkpoint"),
        (changed(dataset={"source": "local:rows/a.jsonl", "text": "other"}), "invalid_dataset", "models.0.dataset"),
        (changed(dataset={"source": "local:rows/a.jsonl", "image": "x"}), "invalid_request", "models.0.dataset.image"),
        (score_recipe("a", name="mask_fisher", estimator="exact"), "invalid_request", "method.estimator"),
        (score_recipe("a", name="auto"), "invalid_request", "method"),
        (score_recipe("a", name="regmean", examples="auto"), "invalid_request", "method"),
    ],
    ids=str,
)
def test_refusals_are_those_of_a_merge(service: Service, recipe: Recipe, code: str, field: str) -> None:
    response = service.post("/scores", json=recipe)
    assert_problem(response, 422, code)
    assert response.json()["errors"][0]["field"] == field


def test_what_only_the_work_shows_fails_the_job(service: Service, tiny_inputs: Path) -> None:
    def spoil(tensors: Any) -> None:
        tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")

    edit_tensors(tiny_checkpoint(tiny_inputs / "checkpoints" / "spoilt"), spoil)
    recipe = score_recipe("a", "spoilt")
    recipe["models"][1]["dataset"]["source"] = "local:rows/a.jsonl"
    job = service.finished(submit(service, recipe))
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_checkpoint")
    assert "bert.encoder.layer.1.output.dense.weight" in job["error"]["message"]
    (tiny_inputs / "checkpoints" / "spoilt" / "model.safetensors").unlink()
    retried = service.post(f"/jobs/{job['id']}/retry")
    assert (retried.status_code, retried.json()["kind"]) == (202, "scores")
    assert service.finished(job["id"])["attempt"] == 2
    with service.http as http:
        assert http.delete(f"/jobs/{job['id']}").status_code == 204


def test_jobs_of_both_kinds_are_listed(service: Service, job: dict[str, Any]) -> None:
    merge = service.finished(service.submit(tiny_recipe("a", name="average")))
    kinds = {entry["id"]: entry["kind"] for entry in service.get("/jobs", params={"limit": 100}).json()["data"]}
    assert (kinds[job["id"]], kinds[merge["id"]]) == ("scores", "merge")
    found = service.get("/jobs", params={"label": "team:scores"}).json()["data"]
    assert job["id"] in [entry["id"] for entry in found]


def test_the_listing_says_what_each_statistic_is(service: Service, job: dict[str, Any]) -> None:
    model = job["result"]["models"][0]
    digest = model["scores"][0]["digest"]
    for given in (model["digest"], model["digest"].removeprefix("sha256:")):
        found = service.get("/scores", params={"checkpoint": given, "statistic": "mask_fisher"}).json()["data"]
        assert {entry["checkpoint"] for entry in found} == {model["digest"]}
        [entry] = [entry for entry in found if entry["digest"] == digest]
        assert entry["created_at"] <= entry["used_at"]
        assert {name: entry[name] for name in set(entry) - {"created_at", "used_at"}} == {
            "digest": digest,
            "statistic": "mask_fisher",
            "checkpoint": model["digest"],
            "source": "local:checkpoints/a",
            "dataset": "local:rows/a.jsonl",
            "examples": 64,
            "estimator": "expected",
            "precision": job["result"]["method"]["precision"],
            "seed": None,
            "paper": False,
            "population": 200,
            "max_length": 48,
            "batch_tokens": 2048,
            "bytes": model["scores"][0]["bytes"],
            "href": f"/scores/{digest}",
        }
    assert service.get("/scores", params={"checkpoint": "0" * 64}).json() == {"data": [], "next": None}
    for query in ({"checkpoint": "local:a"}, {"statistic": "other"}, {"after": "x"}, {"limit": "0"}):
        assert_problem(service.get("/scores", params=query), 400, "malformed")


def test_pages_of_scores_follow_each_other_newest_first(service: Service, job: dict[str, Any]) -> None:
    with Client(f"http://127.0.0.1:{service.port}") as client:
        everything = list(client.scores(page_size=100))  # other tests of this service have made many
        paged = list(client.scores(page_size=1))
    assert [entry.created_at for entry in everything] == sorted((e.created_at for e in everything), reverse=True)
    assert [entry.digest for entry in paged] == [entry.digest for entry in everything]
    assert {model["scores"][0]["digest"] for model in job["result"]["models"]} <= {e.digest for e in paged}


def test_a_statistic_answers_ranges_and_conditions(service: Service, job: dict[str, Any]) -> None:
    kept = job["result"]["models"][0]["scores"][0]
    whole = service.get(kept["href"])
    assert whole.headers["ETag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
    assert whole.headers["Repr-Digest"].startswith("sha-256=:")
    name = f"mask_fisher-{kept['digest'][:12]}.safetensors"
    assert whole.headers["Content-Disposition"] == f'attachment; filename="{name}"'
    assert service.get(f"/scores/sha256:{kept['digest']}").content == whole.content
    part = service.get(kept["href"], headers={"Range": "bytes=2-5", "If-Range": whole.headers["ETag"]})
    assert (part.status_code, part.content) == (206, whole.content[2:6])
    assert service.get(kept["href"], headers={"If-None-Match": whole.headers["ETag"]}).status_code == 304
    with service.http as http:
        head = http.head(kept["href"])
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(whole.content)))
    assert_problem(service.get(kept["href"], headers={"Range": "bytes=99999999-"}), 416, "range_not_satisfiable")


def test_what_is_not_kept_is_not_found(service: Service) -> None:
    assert_problem(service.get(f"/scores/{'0' * 64}"), 404, "not_found")
    for digest in ("0" * 63, "%2e%2e", "%2e%2e%2fredis", f"{'0' * 64}/about.json", "sha256:", "A" * 64):
        response = service.get(f"/scores/{digest}")
        assert response.status_code == 404, digest
        assert response.headers["Content-Type"] == "application/problem+json"


def test_downloads_leave_nothing_open(service: Service, job: dict[str, Any]) -> None:
    api = service.processes()["api"]

    def held() -> list[str]:
        return [file.path for file in api.open_files() if "/statistics/" in file.path]

    kept = job["result"]["models"][0]["scores"][0]
    etag = service.get(kept["href"]).headers["ETag"]
    for headers in ({}, {"If-None-Match": etag}, {"Range": "bytes=1-2"}, {"Range": "bytes=99999999-"}):
        service.get(kept["href"], headers=headers)
    with service.http as http:
        http.head(kept["href"])
    wait_until(lambda: not held(), "the files to be closed")


# --- several workers


def long_recipe(*names: str) -> Recipe:
    recipe = tiny_recipe(*names, examples=3000)
    for model in recipe["models"]:
        model["dataset"]["source"] = f"local:rows/lots-{model['name']}.jsonl"
        del model["evaluation"]
    return {**measured_anew(recipe), "evaluate": False, "output": {"align_heads": False}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    """Two workers."""
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        write_rows(tiny_inputs / "rows" / f"lots-{name}.jsonl", count=3000, labels=labels, seed=seed)
    service = make_service(tmp_path_factory.mktemp("pair"), tiny_inputs)
    service.start(workers=2)
    wait_until(lambda: service.get("/readyz").json()["workers"] == 2, "both workers")
    yield service
    assert service.stop() == 0


def kept_examples(service: Service) -> list[int]:
    with Client(service.url) as client:
        return [entry.examples for entry in client.scores()]


def test_two_merges_at_once_score_each_model_once(pair: Service) -> None:
    service, before = pair, kept_examples(pair)
    recipe = long_recipe("a", "b")
    ids = [service.submit({**recipe, "name": name}) for name in ("one", "two")]
    with held_up(service, ids):
        pass
    jobs = [service.finished(i) for i in ids]
    assert [job["status"] for job in jobs] == ["succeeded", "succeeded"]
    first, second = ([model["score_cached"] for model in job["result"]["models"]] for job in jobs)
    assert [sorted(pair) for pair in zip(first, second, strict=True)] == [[False, True], [False, True]]
    assert sorted(kept_examples(service)) == sorted(before + 2 * looks(3000))
    assert not list((service.data_dir / "statistics").glob(".*"))


@pytest.mark.long
def test_when_the_one_that_computes_is_killed_the_other_takes_over(pair: Service) -> None:
    service, before = pair, kept_examples(pair)
    recipe = long_recipe("a")
    ids = [service.submit({**recipe, "name": name}) for name in ("one", "two")]
    with held_up(service, ids) as holder:
        assert kept_examples(service).count(3000) == before.count(3000)
        holder.send_signal(signal.SIGKILL)
    jobs = [service.finished(i) for i in ids]
    assert [job["status"] for job in jobs] == ["succeeded", "succeeded"]
    assert sorted(job["attempt"] for job in jobs) == [1, 2]
    assert sorted(job["result"]["models"][0]["score_cached"] for job in jobs) == [False, True]


@contextmanager
def held_up(service: Service, jobs: list[str]) -> Iterator[psutil.Process]:
    """The process that computes what both jobs want: it is stopped until both are there, and while in context."""
    holder = wait_until(lambda: lock_holder(service.data_dir / "statistics"), "one to compute", interval_s=0.01)
    holder.suspend()
    try:
        wait_until(lambda: all(service.job(i)["progress"]["phase"] == "scoring" for i in jobs), "both to score")
        yield holder
    finally:
        with suppress(psutil.NoSuchProcess):
            holder.resume()


def lock_holder(folder: Path) -> psutil.Process | None:
    """The process that holds a lock in the folder, as the kernel says."""
    inodes = {lock.stat().st_ino for lock in folder.glob(".lock-*")}
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and int(words[5].rpartition(":")[2]) in inodes:
            return psutil.Process(int(words[4]))
    return None


def test_a_job_that_waits_for_another_can_be_cancelled(pair: Service) -> None:
    keeps_within(CANCEL_S, lambda: cancelled_while_it_waits(pair))


def cancelled_while_it_waits(service: Service) -> float:
    recipe = long_recipe("a")
    del recipe["evaluate"], recipe["output"]
    ids = [submit(service, {**recipe, "name": name}) for name in ("one", "two")]
    with held_up(service, ids) as holder, Client(service.url) as client:
        workers = {i: next(client.log(i)).message for i in ids}
        [waiting] = [i for i, message in workers.items() if f"-{holder.ppid()}-" not in message]
        [running] = set(ids) - {waiting}
        start = time.monotonic()
        client.cancel(waiting)
        assert service.finished(waiting)["status"] == "cancelled"
        took = time.monotonic() - start
        assert service.job(running)["status"] == "running"
    assert service.finished(running)["status"] == "succeeded"
    return took
