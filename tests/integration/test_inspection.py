"""What a request names is inspected by processes of their own, whose end is nobody else's."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.errors import Problem, ProblemError
from app.contracts.requests import MergeRequest
from app.services.bodies import read_body
from app.services.checks import Accepted
from app.services.inspection import Inspectors, Limits
from app.storage.artifacts.folder import FolderStore
from tests.conftest import HANGS_S, tiny_recipe

LONG = 1_000_000  # tokens that take some seconds to read
PATIENT = Limits(seconds=HANGS_S)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Path:
    """`tiny_inputs`, and `checkpoints/slow`, whose vocabulary takes some seconds and some hundred MB to read."""
    root = tmp_path_factory.mktemp("inspected") / "inputs"
    shutil.copytree(tiny_inputs, root)
    slow = root / "checkpoints" / "slow"
    slow.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_inputs / "checkpoints" / "a" / name, slow)
    (slow / "vocab.json").write_text(json.dumps({f"token {index}": index for index in range(LONG)}))
    return root


@asynccontextmanager
async def inspecting(inputs: Path, data: Path, limits: Limits = PATIENT) -> AsyncIterator[Inspectors]:
    FolderStore(data).prepare()
    inspectors = Inspectors((inputs,), data, "folder", limits)
    inspectors.start()
    try:
        yield inspectors
    finally:
        inspectors.close()


async def check(inspectors: Inspectors, *names: str) -> Accepted:
    return await inspectors.check(MergeRequest.model_validate(tiny_recipe(*names)), DEFAULT_TENANT, {})


async def copy_of(inspectors: Inspectors) -> psutil.Process:
    """The one that takes the first question, as soon as there is one; the next waits beside it."""
    assert inspectors._process is not None
    inspector = psutil.Process(inspectors._process.pid)
    while True:
        if copies := inspector.children():
            return min(copies, key=psutil.Process.create_time)
        await asyncio.sleep(0.01)


async def end_of(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)


async def refusal(check: Coroutine[Any, Any, Accepted]) -> ProblemError:
    try:
        accepted = await check
    except ProblemError as error:
        return error
    pytest.fail(f"it was accepted: {accepted}")


def test_bodies_are_read_as_they_were_sent(inputs: Path, tmp_path: Path) -> None:
    recipe = b"merge_method: slerp\nbase_model: a/one\nmodels: [{model: a/two}]\nparameters: {t: 0.5}\n"
    texts = {"half": "\ud800", "whole": "\U0001f600", "number": 10**60, "negative": -0.0, "nested": [{"": None}]}

    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            body = await inspectors.read(recipe, is_yaml=True)
            assert body == read_body(recipe, is_yaml=True)
            assert body.fields_there["output.config_from"] == "base_model"
            sent = json.dumps(texts)
            assert repr((await inspectors.read(sent.encode(), is_yaml=False)).content) == repr(texts)
            for bad in (b'{"\\ud800":1,"\\ud800":2}', b"\xff"):
                with pytest.raises(ProblemError) as refused:
                    await inspectors.read(bad, is_yaml=False)
                assert refused.value.problem is Problem.MALFORMED

    run(test)


def recipe_with(template: str, *names: str) -> MergeRequest:
    recipe = tiny_recipe(*names, name="average")
    return MergeRequest.model_validate({**recipe, "output": {**recipe.get("output", {}), "chat_template": template}})


def test_a_chat_template_that_is_no_jinja_is_refused_at_the_door(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            for template in ("{% broken", "{% if a %}", "{{ " + "(" * 9000):
                error = await refusal(inspectors.check(recipe_with(template, "a", "b"), DEFAULT_TENANT, {}))
                assert (error.problem, error.errors[0].field) == (Problem.INVALID_REQUEST, "output.chat_template")
                assert "it is no Jinja: " in error.detail
            ours = "{% generation %}{% for m in messages %}{% break %}{% endfor %}{% endgeneration %}"
            accepted = await inspectors.check(recipe_with(ours, "a", "b"), DEFAULT_TENANT, {})
            assert accepted.request["output"]["chat_template"] == ours

    run(test)


def test_a_checkpoints_template_that_is_no_jinja_is_told_before_the_job(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        shutil.copytree(inputs / "checkpoints" / "a", inputs / "checkpoints" / "broken", dirs_exist_ok=True)
        (inputs / "checkpoints" / "broken" / "chat_template.jinja").write_text("{% broken")
        async with inspecting(inputs, tmp_path) as inspectors:
            recipe = tiny_recipe("a", "b", name="average")
            recipe["models"][0]["checkpoint"] = "local:checkpoints/broken"
            accepted = await inspectors.check(MergeRequest.model_validate(recipe), DEFAULT_TENANT, {})
        assert accepted.plan is not None
        told = "the chat template of local:checkpoints/broken is no Jinja"
        assert accepted.plan.notes[0].startswith(told)

    run(test)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), HANGS_S))


def test_what_is_accepted_is_told_with_defaults_states_and_plan(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            accepted = await check(inspectors, "a", "b")
        assert accepted.plan is not None
        assert accepted.plan.request == accepted.request
        assert accepted.request["name"] == "a+b"
        assert set(accepted.states) == {"local:checkpoints/a", "local:checkpoints/b"}

    run(test)


def test_one_that_hangs_is_ended_and_the_file_is_named(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path, Limits(seconds=2)) as inspectors:
            asked = asyncio.create_task(refusal(check(inspectors, "a", "slow")))
            copy = await copy_of(inspectors)
            while not (files := [file.path for file in copy.open_files()]) or not files[0].endswith("vocab.json"):
                await asyncio.sleep(0.001)
            copy.suspend()
            refused = await asked
            await end_of(copy)
            assert (refused.problem, refused.errors[0].field) == (Problem.INVALID_CHECKPOINT, "models.1.checkpoint")
            assert "local:checkpoints/slow: vocab.json: " in refused.detail
            assert "more than 2 s" in refused.detail
            await check(inspectors, "a", "b")

    run(test)


def test_one_that_is_killed_is_a_refusal_that_names_the_file(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            asked = asyncio.create_task(refusal(check(inspectors, "slow", "a")))
            copy = await copy_of(inspectors)
            while copy.cpu_times().user < 0.3:  # it reads the vocabulary by then
                await asyncio.sleep(0.01)
            copy.kill()
            refused = await asked
            assert (refused.problem, refused.errors[0].field) == (Problem.INVALID_CHECKPOINT, "models.0.checkpoint")
            assert "local:checkpoints/slow: vocab.json: " in refused.detail
            await check(inspectors, "a", "b")

    run(test)


def test_one_without_memory_is_a_refusal_that_names_the_file(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path, Limits(seconds=HANGS_S, memory_bytes=200_000_000)) as inspectors:
            refused = await refusal(check(inspectors, "a", "slow"))
            assert (refused.problem, refused.errors[0].field) == (Problem.INVALID_CHECKPOINT, "models.1.checkpoint")
            assert "local:checkpoints/slow: vocab.json: " in refused.detail
            assert "memory" in refused.detail
            await check(inspectors, "a", "b")

    run(test)


def test_more_than_there_are_places_for_wait_and_then_are_told_to_come_again(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        limits = Limits(seconds=HANGS_S, places=1, queue_seconds=0.1)
        async with inspecting(inputs, tmp_path, limits) as inspectors:
            first = asyncio.create_task(check(inspectors, "a", "b"))
            copy = await copy_of(inspectors)
            copy.suspend()
            refused = await refusal(check(inspectors, "a", "c"))
            assert (refused.problem, refused.headers["Retry-After"]) == (Problem.TOO_BUSY, "10")
            assert refused.problem.status == 503
            copy.resume()
            await first
            await check(inspectors, "a", "c")

    run(test)


def test_whatever_ends_the_inspector_another_takes_its_place(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            await check(inspectors, "a", "b")
            assert inspectors._process is not None
            os.kill(inspectors._process.pid, signal.SIGKILL)
            await check(inspectors, "a", "b")

    run(test)


def test_all_end_with_who_asks(inputs: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            asked = asyncio.create_task(check(inspectors, "slow", "a"))
            copy = await copy_of(inspectors)
            inspector = copy.parent()
            assert inspector is not None
            asked.cancel()
        for process in (inspector, copy):
            await end_of(process)

    run(test)


def test_an_inspection_leaves_no_files_behind(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path / "data") as inspectors:
            asked = asyncio.create_task(refusal(check(inspectors, "slow", "a")))
            copy = await copy_of(inspectors)
            while len(folders := list((tmp_path / "scratch").glob("*/*"))) < 2:  # the inspector's own, and the copy's
                await asyncio.sleep(0.01)
            for folder in folders:
                (folder / "left").touch()
            copy.kill()
            await asked
        assert not list((tmp_path / "scratch").iterdir())

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    run(test)


def test_the_password_of_redis_is_not_told_the_inspector(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKMERGE_REDIS_URL", "redis://:secret-word@127.0.0.1:1")

    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            assert inspectors._process is not None
            told = psutil.Process(inspectors._process.pid)
            assert "secret-word" not in repr((told.cmdline(), told.environ()))

    run(test)


def test_a_waiting_copy_that_hangs_is_replaced_with_its_inspector(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path) as inspectors:
            await check(inspectors, "a", "b")  # it is loaded by then
            monkeypatch.setattr("app.services.inspection.START_S", 1.0)
            (await copy_of(inspectors)).suspend()
            asked = asyncio.create_task(check(inspectors, "a", "b"))
            await asyncio.sleep(1.5)
            monkeypatch.setattr("app.services.inspection.START_S", HANGS_S)  # the next inspector loads
            await asked

    run(test)


def test_a_scratch_folder_that_was_tidied_away_is_made_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with inspecting(inputs, tmp_path / "data") as inspectors:
            [scratch] = (tmp_path / "scratch").iterdir()
            shutil.rmtree(scratch)
            await check(inspectors, "a", "b")
            await check(inspectors, "a", "b")
        assert not list((tmp_path / "scratch").iterdir())

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    run(test)
