"""`maskmerge run`: the whole service for one job, which leaves nothing but the result."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForSequenceClassification

from app.cli.run import _interruptible
from tests.conftest import HANGS_S, REPOSITORY, tiny_recipe, wait_until

MERGEKIT = """
merge_method: linear
models:
  - model: ./linked/a
    parameters: {weight: 1.0}
  - model: %s
    parameters: {weight: 3.0}
dtype: float32
"""


@pytest.fixture
def place(tmp_path: Path, tiny_inputs: Path) -> Path:
    """A working directory with a link to checkpoints that lie elsewhere."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "linked").symlink_to(tiny_inputs / "checkpoints")
    return folder


@contextmanager
def running(place: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The command; what it started is gone when it ends, and so is what it wrote beside its result."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MASKMERGE_REDIS_URL": "redis://127.0.0.1:1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "app.cli", "run", *arguments]
    with subprocess.Popen(
        command, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_a_recipe_of_mergekit_is_merged_where_its_user_is(place: Path, tiny_inputs: Path) -> None:
    (place / "recipe.yaml").write_text(MERGEKIT % (tiny_inputs / "checkpoints" / "c"))
    documented = "maskmerge run recipe.yaml --output out/merged"
    assert f"```sh\n{documented}\n```" in (REPOSITORY / "docs" / "client.md").read_text()
    with running(place, *documented.split()[2:], "--json") as process:
        printed, errors = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0, errors
    job = json.loads(printed)
    assert [model["weight_share"] for model in job["result"]["models"]] == [0.25, 0.75]
    assert names(place) == {"linked", "recipe.yaml", "out"}
    assert names(place / "out") == {"merged"}
    assert {"manifest.json", "models", "recipe.json"} <= names(place / "out" / "merged")
    for model in (place / "out" / "merged" / "models").iterdir():
        AutoModelForSequenceClassification.from_pretrained(model)
    lines = errors.splitlines()
    assert (lines[0], lines[-1]) == ("queued", "the result is in out/merged")
    assert not re.search("redis|valkey|Traceback", errors, re.IGNORECASE)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_one_leaves_nothing_behind(place: Path, number: signal.Signals) -> None:
    recipe = tiny_recipe("a", "c", name="average")
    for model in recipe["models"]:
        model["checkpoint"] = f"linked/{model['name']}"
        del model["dataset"], model["evaluation"]
    (place / "recipe.json").write_text(json.dumps(recipe))
    with running(place, "recipe.json", "--output", "merged") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "queued\n"
        started = wait_until(lambda: engine_of(process.pid), "its engine")
        process.send_signal(number)
        _, errors = process.communicate(timeout=HANGS_S)
    assert process.returncode == 130
    assert errors == "maskmerge: interrupted; nothing is left of the job\n"
    assert names(place) == {"linked", "recipe.json"}
    assert [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize(("before", "is_told"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_terminal_that_closes_ends_it_but_not_under_nohup(before: signal.Handlers, is_told: bool) -> None:
    kept = signal.signal(signal.SIGHUP, before)
    try:
        with _interruptible() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert interrupted.is_set() == is_told
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, kept)


def engine_of(pid: int) -> list[psutil.Process]:
    """All processes below, once the engine is among them."""
    found = psutil.Process(pid).children(recursive=True)
    return found if any("worker.engine_process" in one.cmdline() for one in found) else []


def test_what_is_refused_leaves_nothing_behind(place: Path) -> None:
    taken = place / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    (place / "recipe.yaml").write_text(MERGEKIT % "./nothere")
    for arguments, status, says in (
        (["--output", "taken"], 2, "is there already"),
        (["--output", "merged"], 1, "there is no './nothere' on this machine"),
    ):
        with running(place, "recipe.yaml", *arguments) as process:
            printed, errors = process.communicate(timeout=HANGS_S)
        assert (process.returncode, printed) == (status, "")
        assert says in errors
    assert names(place) == {"linked", "recipe.yaml", "taken"}


@pytest.mark.long
def test_what_the_service_refuses_is_said_in_the_users_words(place: Path) -> None:
    for text, *wanted in (
        ("method: {name: avrage}\nmodels: [{name: a, checkpoint: linked/a}]", "maskmerge: method", "average"),
        (
            "method: {name: average}\nmodels: [{name: a, checkpoint: linked/a}]\nwebhook: {url: 'https://example.org/'}",
            "maskmerge: webhook: nothing is left",
        ),
        ((MERGEKIT % "linked/b").replace("3.0", "heavy"), "maskmerge: models.1.parameters.weight: give a number"),
        (MERGEKIT % "lm/nothere", "models.1.model: ", "there is no folder 'lm/nothere' here"),
    ):
        (place / "recipe.yaml").write_text(text)
        with running(place, "recipe.yaml", "--output", "merged") as process:
            printed, errors = process.communicate(timeout=HANGS_S)
        assert (process.returncode, printed) == (1, "")
        assert all(words in errors for words in wanted), errors
    assert names(place) == {"linked", "recipe.yaml"}
