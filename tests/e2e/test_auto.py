"""Searches for the best merge on the running service: what they find, what ends them, and how they go on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.contracts.jobs import PhaseName
from app.contracts.requests import as_recipe
from tests.conftest import REPOSITORY, Service, assert_problem, make_service, tiny_recipe, wait_until
from tests.tiny import tiny_checkpoint, write_lines, write_rows
from tests.tiny_families import TINY_FAMILIES

Job = dict[str, Any]
Recipe = dict[str, Any]
CANCEL_S = 5  # the promise for a running job
ROWS = 320
TRIALS = 24
CANDIDATES = ["average", "task_arithmetic", {"name": "ties", "density": 0.5}, "mask_fisher"]


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    rows = tiny_inputs / "rows"
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        write_rows(rows / f"half-{name}.jsonl", count=ROWS, labels=labels, seed=seed, longest=12)
        lines = (rows / f"half-{name}.jsonl").read_text().splitlines()
        write_lines(rows / f"train-{name}.jsonl", lines[: ROWS // 2])
        write_lines(rows / f"held-{name}.jsonl", lines[ROWS // 2 :])
    write_lines(rows / "same.jsonl", [json.dumps({"text": "one two", "label": 0})] * 3)
    return tiny_inputs


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Iterator[Service]:
    service = make_service(tmp_path_factory.mktemp("auto"), inputs, MASKMERGE_MAX_LOSSES="2", MASKMERGE_THREADS="1")
    service.start()
    yield service
    assert service.stop() == 0


def search_recipe(*candidates: Any, trials: int = 12, **fields: Any) -> Recipe:
    recipe = tiny_recipe("a", "b", name="auto", candidates=list(candidates or CANDIDATES), trials=trials, examples=64)
    for model in recipe["models"]:
        model["dataset"]["source"] = f"local:rows/train-{model['name']}.jsonl"
        model["evaluation"] = {"source": f"local:rows/held-{model['name']}.jsonl"}
    return {**recipe, "base": "local:checkpoints/base", **fields}


def journals(service: Service, job_id: str) -> list[Path]:
    return sorted((service.data_dir / "searches").glob(f"{job_id}.*"))


def tried(service: Service, job_id: str) -> list[dict[str, Any]]:
    """What the job's journal has, without what a kill left of a line."""
    found = [journal for journal in journals(service, job_id) if journal.suffix == ".jsonl"]
    try:
        lines = found[-1].read_text().splitlines(keepends=True) if found else []
    except FileNotFoundError:  # the job ended, or another attempt took it over
        return []
    return [json.loads(line) for line in lines[1:] if line.endswith("\n")]


def start_searching(service: Service, recipe: Recipe, trials: int) -> str:
    job_id = service.submit(recipe)
    wait_until(lambda: len(tried(service, job_id)) >= trials, f"{trials} trials", interval_s=0.02)
    assert service.job(job_id)["status"] == "running"
    return job_id


def succeeded(service: Service, job_id: str) -> Job:
    job = service.finished(job_id)
    assert job["status"] == "succeeded", job["error"]
    return job


def weights_of(service: Service, job_id: str) -> dict[str, str]:
    """sha256 of every published tensor file."""
    files = service.get(f"/jobs/{job_id}/artifacts").json()["files"]
    return {f["name"]: f["sha256"] for f in files if f["name"].endswith(".safetensors")}


def outcome(job: Job) -> Job:
    """What a search came to, without how long it took."""
    result = job["result"]
    trials = [{**trial, "seconds": 0} for trial in result["search"]["trials"]]
    return {
        **{k: result[k] for k in ("method", "candidates", "metrics")},
        "search": {**result["search"], "trials": trials},
    }


def recipe_of(service: Service, job_id: str) -> Recipe:
    recipe: Recipe = service.get(f"/jobs/{job_id}/artifacts/recipe.json").json()
    return recipe


@pytest.fixture(scope="module")
def found(service: Service) -> Job:
    """A search that nothing disturbs."""
    return succeeded(service, service.submit(search_recipe(trials=TRIALS)))


def test_the_best_of_what_was_tried_is_published(service: Service, found: Job) -> None:
    result = found["result"]
    search, candidates = result["search"], result["candidates"]
    assert len(search["trials"]) == TRIALS
    assert search["search_rows"] == search["held_out_rows"] == {"a": ROWS // 4, "b": ROWS // 4}
    assert {c["name"] for c in candidates if c["kind"] == "method"} == {
        "average", "task_arithmetic", "ties", "mask_fisher",
    }  # fmt: skip
    baselines = ["plain average", "plain task arithmetic", "expert a", "expert b", "base"]
    assert [c["name"] for c in candidates if c["kind"] != "method"] == baselines
    [chosen] = [c for c in candidates if c["chosen"]]
    assert chosen["trial"] == search["chosen"]
    best = max(trial["objective"] for trial in search["trials"] if not trial["pruned"])
    assert next(t for t in search["trials"] if t["number"] == search["chosen"])["objective"] == best
    assert result["method"]["name"] == chosen["method"]["name"]
    assert all(c["method"]["density"] == 0.5 for c in candidates if c["name"] == "ties"), "what is given is kept"
    assert result["mean_retention"] == chosen["mean_retention"]
    assert {m: entry["examples"] for m, entry in result["metrics"].items()} == search["held_out_rows"]
    assert journals(service, found["id"]) == []
    seen = list(dict.fromkeys(event["phase"] for event in events(service, found["id"], "progress")))
    assert seen == [phase.value for phase in PhaseName if phase in seen]


def events(service: Service, job_id: str, kind: str) -> list[dict[str, Any]]:
    text = service.get(f"/jobs/{job_id}/events").text
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]
    return [json.loads(block["data"]) for block in blocks if block.get("event") == kind]


def test_the_recipe_of_the_artifact_posted_again_gives_the_same(service: Service, found: Job) -> None:
    recipe = recipe_of(service, found["id"])
    assert recipe == as_recipe(found["request"])
    assert recipe["method"]["candidates"] == [c if isinstance(c, dict) else {"name": c} for c in CANDIDATES]
    again = succeeded(service, service.submit(recipe))
    assert outcome(again) == outcome(found)
    assert weights_of(service, again["id"]) == weights_of(service, found["id"])


@pytest.mark.long
def test_a_search_whose_engine_is_killed_goes_on_and_finds_the_same(service: Service, found: Job) -> None:
    job_id = service.submit(search_recipe(trials=TRIALS))
    before = kill_searching(service, job_id, 8)
    job = succeeded(service, job_id)
    assert job["attempt"] == 2
    trials = job["result"]["search"]["trials"]
    assert [trial["seconds"] for trial in trials[: len(before)]] == [trial["seconds"] for trial in before]
    assert outcome(job) == outcome(found)
    assert weights_of(service, job_id) == weights_of(service, found["id"])
    assert journals(service, job_id) == []


def kill_searching(service: Service, job_id: str, trials: int) -> list[dict[str, Any]]:
    """Kill the engine when so many trials were made; those that the journal has then."""
    wait_until(lambda: len(tried(service, job_id)) >= trials, f"{trials} trials", interval_s=0.02)
    engine = service.processes()["engine"]
    engine.suspend()
    before = tried(service, job_id)
    engine.send_signal(signal.SIGKILL)
    assert trials <= len(before) < TRIALS
    return before


def lose_twice(service: Service) -> tuple[Job, list[dict[str, Any]]]:
    """A search that failed, since its engine was killed as often as may be, and what it had tried."""
    job_id = service.submit(search_recipe(trials=TRIALS))
    first = kill_searching(service, job_id, 3)
    before = kill_searching(service, job_id, len(first) + 3)
    assert before[: len(first)] == first
    return service.finished(job_id), before


@pytest.mark.long
def test_a_failed_search_is_kept_for_a_retry(service: Service, found: Job) -> None:
    job, before = lose_twice(service)
    assert (job["status"], job["error"]["code"]) == ("failed", "worker_lost")
    assert len(journals(service, job["id"])) == 1
    assert service.post(f"/jobs/{job['id']}/retry").status_code == 202
    again = succeeded(service, job["id"])
    trials = again["result"]["search"]["trials"]
    assert [trial["seconds"] for trial in trials[: len(before)]] == [trial["seconds"] for trial in before]
    assert outcome(again) == outcome(found)
    assert journals(service, job["id"]) == []


@pytest.mark.long
def test_a_deleted_search_is_gone_with_its_journal(service: Service) -> None:
    job, _ = lose_twice(service)
    assert len(journals(service, job["id"])) == 1
    with service.http as http:
        assert http.delete(f"/jobs/{job['id']}").status_code == 204
    assert journals(service, job["id"]) == []


@pytest.mark.long
def test_a_search_is_cancelled_within_5_s_and_leaves_nothing(service: Service) -> None:
    job_id = start_searching(service, search_recipe(trials=1000), trials=2)
    wait_until(
        lambda: service.job(job_id)["progress"]["phase"] == "searching", "progress, which is recorded now and then"
    )
    progress = service.job(job_id)["progress"]
    assert progress["unit"] == "merges"
    assert progress["total"] >= 1000
    assert service.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelling"
    asked = time.monotonic()
    job = service.finished(job_id)
    assert time.monotonic() - asked < CANCEL_S
    assert (job["status"], job["result"], job["error"]) == ("cancelled", None, None)
    assert journals(service, job_id) == []
    assert not list((service.data_dir / "work").glob(f"{job_id}.*"))
    succeeded(service, service.submit(tiny_recipe("a", name="average")))


def test_what_a_search_has_tried_is_gone_when_it_is_cancelled_while_it_waits(service: Service) -> None:
    running = start_searching(service, search_recipe(trials=1000), trials=1)
    waiting = service.submit(search_recipe())
    left = service.data_dir / "searches" / f"{waiting}.1.jsonl"
    left.write_text("as an attempt that was handed back would leave it")
    assert service.post(f"/jobs/{waiting}/cancel").json()["status"] == "cancelled"
    assert not left.exists()
    service.post(f"/jobs/{running}/cancel")
    assert service.finished(running)["status"] == "cancelled"


@pytest.mark.long
def test_floors_are_kept_where_that_can_be(service: Service) -> None:
    recipe = search_recipe("average", "task_arithmetic", trials=4)
    for model, floor in zip(recipe["models"], (0.0, 2.0), strict=True):
        model["min_retention"] = floor
    job = succeeded(service, service.submit(recipe))
    search = job["result"]["search"]
    assert (search["min_retention"], search["feasible"]) == ({"a": 0.0, "b": 2.0}, False)
    assert any("min_retention" in note for note in job["result"]["notes"])
    assert [m["min_retention"] for m in job["request"]["models"]] == [0.0, 2.0]
    recipe["models"][1]["min_retention"] = 0.0
    assert succeeded(service, service.submit(recipe))["result"]["search"]["feasible"] is True


def test_candidates_by_default_are_those_that_can_be_run(service: Service) -> None:
    recipe = search_recipe(trials=5)
    recipe["method"]["candidates"] = None
    del recipe["base"]
    plan = service.post("/merge/validate", json=recipe).json()
    names = ["average", "mask_fisher", "regmean", "mask_regmean", "aligned_regmean"]
    assert (plan["candidates"], plan["trials"]) == (names, 5)
    assert plan["request"]["method"]["candidates"] == [{"name": name} for name in names]
    one = search_recipe("average", trials=5)
    alone = service.post("/merge/validate", json=one).json()
    assert (alone["examples"], plan["examples"]) == (0, 2 * 64)
    assert plan["peak_memory_bytes"] > alone["peak_memory_bytes"]
    assert alone["aligned_examples"] == plan["aligned_examples"] == 2 * 512
    most = service.post("/merge/validate", json={**one, "output": {"alignment_rows": 100_000}}).json()
    assert most["aligned_examples"] == 2 * 100_000
    # Of each row a search holds what the head reads of two merges, 16 numbers of 4 bytes.
    assert most["peak_memory_bytes"] - alone["peak_memory_bytes"] == 2 * (100_000 - 512) * 2 * 16 * 4
    job = succeeded(service, service.submit(recipe))
    assert {c["name"] for c in job["result"]["candidates"] if c["kind"] == "method"} == set(names)


def test_a_candidate_that_an_architecture_does_not_allow_is_refused(service: Service) -> None:
    """Those by default are all allowed, also where layers share their weights."""
    tiny_checkpoint(service.inputs / "checkpoints" / "albert", family=TINY_FAMILIES["albert"])
    recipe = search_recipe(trials=6)
    recipe["models"] = [{**recipe["models"][0], "checkpoint": "local:checkpoints/albert"}]
    recipe["method"]["candidates"] = None
    del recipe["base"]
    plan = service.post("/merge/validate", json=recipe).json()
    assert plan["candidates"] == ["average", "mask_fisher", "regmean", "mask_regmean", "aligned_regmean"]
    accepted = plan["request"]
    accepted["method"]["candidates"].append({"name": "regmean_plus"})
    refused = service.post("/merge/validate", json=accepted)
    assert_problem(refused, 422, "invalid_checkpoint")
    assert "name method.candidates without it" in refused.json()["detail"]


def test_the_command_line_shows_trials_and_what_was_chosen(service: Service, found: Job, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(service, found["id"])))
    command = [sys.executable, "-m", "app.cli", "submit", str(recipe), "--url", f"http://127.0.0.1:{service.port}"]
    done = subprocess.run([*command, "--wait"], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert any(line.startswith("searching ") for line in lines)
    [chosen] = [c for c in found["result"]["candidates"] if c["chosen"]]
    place = lines.index(f"chosen: {chosen['name']}, trial {chosen['trial']} of {TRIALS}")
    assert lines[place - 1 - len(found["result"]["notes"])] == "succeeded"
    table = lines[place + 2 :]
    assert len(table) == len(found["result"]["candidates"])
    [line] = [line for line in table if line.startswith("* ")]
    assert line.split() == [
        "*", *chosen["name"].split(), f"{chosen['mean_retention']:.4f}", f"{chosen['min_retention']:.4f}",
    ]  # fmt: skip


def test_a_merge_that_does_not_beat_what_it_must_is_written_and_not_accepted(service: Service, tmp_path: Path) -> None:
    """The average does not beat itself. The command line fails, and what was made can be looked at."""
    asked = search_recipe("average", trials=1)
    asked["method"]["must_beat"] = ["average", "base"]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "app.cli", "submit", str(recipe), "--url", f"http://127.0.0.1:{service.port}"]
    done = subprocess.run([*command, "--wait"], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert (done.returncode, done.stderr) == (5, "")
    first, *lines = done.stdout.splitlines()
    verdict = lines[lines.index("succeeded") + 1]
    assert verdict.startswith("note: what auto chose, average, is not accepted: on the held-out rows it does not beat")
    job = service.job(first.removeprefix("job "))
    assert job["result"]["accepted"] is False
    short = next(one for one in service.get("/jobs").json()["data"] if one["id"] == job["id"])
    assert short["result"]["accepted"] is False
    assert service.get(f"/jobs/{job['id']}/artifacts/report.json").json()["accepted"] is False
    card = service.get(f"/jobs/{job['id']}/artifacts/README.md").text
    assert card.index("is not accepted") < card.index("| candidate |")
    assert "is not accepted" in service.get(f"/jobs/{job['id']}/report").text


def with_evaluation(**evaluation: Any) -> Recipe:
    recipe = search_recipe()
    recipe["models"][1]["evaluation"] |= evaluation
    return recipe


REFUSED: dict[str, tuple[Recipe, str, str, list[str]]] = {
    "an unknown candidate": (search_recipe("tis"), "invalid_request", "method.candidates.0", ["did you mean 'ties'"]),
    "one text": (
        with_evaluation(source="local:rows/same.jsonl"), "invalid_dataset", "models.1.evaluation",
        ["rows/same.jsonl: 1 different texts, and 2 are needed"],
    ),
    "one row": (with_evaluation(limit=1), "invalid_request", "models.1.evaluation.limit", ["one half"]),
    "a filter that matches nothing": (
        search_recipe("average", {"name": "ties", "density": [{"filter": "x", "value": 1}]}), "invalid_request",
        "method.candidates.1.density.0.filter", ["'x' matches no tensor"],
    ),
    "heads merged": (search_recipe(output={"heads": "merged"}), "invalid_request", "output.heads", ["per_model"]),
    "nothing evaluated": (search_recipe(evaluate=False), "invalid_request", "evaluate", ["leave evaluate out"]),
    "no base to beat": (
        {**search_recipe("average", base=None), "method": {"name": "auto", "must_beat": ["base"]}}, "invalid_request",
        "method.must_beat.0", ["no base to beat"],
    ),
    "no base": (search_recipe("ties", base=None), "invalid_request", "base", ["candidate ties"]),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "code", "field", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_searched_is_refused_at_the_door(
    service: Service, recipe: Recipe, code: str, field: str, says: list[str]
) -> None:
    for path in ("/merge", "/merge/validate"):
        response = service.post(path, json=recipe)
        assert_problem(response, 422, code)
        [error] = response.json()["errors"]
        assert error["field"] == field
        assert all(words in error["message"] for words in says), error
