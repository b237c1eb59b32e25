"""Recipes as YAML, recipes of mergekit, and the command line that posts them, on the running service."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import torch
import yaml

from app.cli import main
from app.client import Client, downloads
from app.contracts.requests import as_recipe
from tests.conftest import HANGS_S, REPOSITORY, Service, assert_problem, tiny_recipe
from tests.tiny import LAYERS, Tensors, edit_tensors, read_model

MERGEKIT = """
merge_method: task_arithmetic
base_model: local:checkpoints/base
models:
  - model: local:checkpoints/base
  - model: local:checkpoints/a
    parameters:
      weight: [0.2, 1.0]
  - model: local:checkpoints/b
    parameters:
      weight:
        - filter: attention.self
          value: 0
        - value: 0.5
parameters:
  lambda:
    - filter: output.dense
      value: 0.5
  normalize: false
dtype: float32
"""


def gradient(values: list[float]) -> list[dict[str, Any]]:
    """As mergekit has it: of layers alone; what lies outside of them has the first value."""
    return [{"filter": "*", "value": values, "where": "layers"}, {"filter": "*", "value": values[0]}]


def post(
    service: Service, text: str | bytes, path: str = "/merge", media_type: str = "application/yaml"
) -> httpx.Response:
    return service.post(path, content=text, headers={"Content-Type": media_type})


def run(service: Service, recipe: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "app.cli", "submit", str(recipe), "--url", f"http://127.0.0.1:{service.port}"]
    return subprocess.run([*command, *options], capture_output=True, text=True, cwd=REPOSITORY, timeout=HANGS_S)


@pytest.mark.parametrize("media_type", ["application/yaml", "application/x-yaml", "text/yaml; charset=utf-8"])
def test_our_own_requests_may_be_yaml(service: Service, media_type: str) -> None:
    recipe = tiny_recipe("a", "b", name="average")
    plan = post(service, yaml.safe_dump(recipe), "/merge/validate", media_type)
    assert plan.status_code == 200, plan.text
    assert plan.json() == service.post("/merge/validate", json=recipe).json()


def test_the_same_recipe_is_the_same_request_in_both(service: Service) -> None:
    recipe = tiny_recipe("a", "b", name="average")
    headers = {"Idempotency-Key": "json or yaml", "Content-Type": "text/yaml"}
    first = service.post("/merge", content=yaml.safe_dump(recipe), headers=headers).json()
    second = service.post("/merge", json=recipe, headers={"Idempotency-Key": "json or yaml"}).json()
    assert first["id"] == second["id"]


@pytest.fixture(scope="module")
def downloaded(service: Service, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The artifact of mergekit's recipe, fetched by the command line, and what that printed."""
    folder = tmp_path_factory.mktemp("recipes")
    recipe = folder / "recipe.yml"
    recipe.write_text(MERGEKIT)
    done = run(service, recipe, "--output", str(folder / "artifact"))
    assert done.returncode == 0, done.stderr
    return folder / "artifact", done.stdout


def test_the_command_line_shows_what_happens(downloaded: tuple[Path, str]) -> None:
    _, printed = downloaded
    first, *lines = printed.splitlines()
    assert first.startswith("job ")
    assert lines[0] == "queued"
    assert any(line.endswith(" %") for line in lines)
    assert lines[-2:] == ["succeeded", f"downloaded to {downloaded[0]}"]


def test_a_merge_by_mergekits_recipe_is_what_mergekit_would_make(
    downloaded: tuple[Path, str], tiny_inputs: Path
) -> None:
    """Its formula, in float64, with its rules for parameters."""
    base, a, b = (read_model(tiny_inputs / "checkpoints" / name) for name in ("base", "a", "b"))
    merged: Tensors = read_model(downloaded[0] / "models" / "a")
    for name, found in merged.items():
        if name.startswith("classifier"):
            continue  # a head is its model's own here
        origin = base[name] if name in base else base[name.removeprefix("bert.")]
        layer = int(name.split(".layer.")[1].split(".")[0]) if ".layer." in name else None
        depth = 0.0 if layer is None else layer / (LAYERS - 1)
        of_a, of_b = 0.2 + 0.8 * depth, 0.0 if "attention.self" in name else 0.5
        scale = 0.5 if "output.dense" in name else 1.0
        deltas = of_a * (a[name].double() - origin.double()) + of_b * (b[name].double() - origin.double())
        torch.testing.assert_close(found.double(), origin.double() + scale * deltas, rtol=0, atol=1e-6, msg=name)


TIES = """
merge_method: ties
base_model: local:checkpoints/base
models:
  - model: local:checkpoints/base
  - model: local:checkpoints/a
    parameters: {density: [0.9, 0.2], weight: 0.7}
  - model: local:checkpoints/b
    parameters:
      density:
        - filter: attention.self
          value: 0.6
      weight: 0.3
parameters: {density: 0.3}
dtype: float32
"""


def test_every_model_has_the_density_that_its_recipe_gives_it(service: Service, tiny_inputs: Path) -> None:
    """mergekit's recipe, its formula in float64."""
    response = post(service, TIES)
    assert response.status_code == 202, response.text
    job = service.finished(response.json()["id"])
    assert job["status"] == "succeeded", job["error"]
    own = [
        {"density": gradient([0.9, 0.2])},
        {"density": [{"filter": "*attention.self*", "value": 0.6}, {"filter": "*", "value": 0.3}]},
    ]
    assert job["request"]["method"]["density"] == 0.3
    assert [model["parameters"] for model in job["request"]["models"]] == own
    assert [model["parameters"] for model in job["result"]["models"]] == own

    artifact = next((service.data_dir / "artifacts").glob(f"{job['id']}.*"))
    base, a, b = (read_model(tiny_inputs / "checkpoints" / name) for name in ("base", "a", "b"))
    for name, found in read_model(artifact / "models" / "a").items():
        if name.startswith("classifier"):
            continue
        origin = (base[name] if name in base else base[name.removeprefix("bert.")]).double()
        layer = int(name.split(".layer.")[1].split(".")[0]) if ".layer." in name else None
        depth = 0.0 if layer is None else layer / (LAYERS - 1)
        densities = (0.9 - 0.7 * depth, 0.6 if "attention.self" in name else 0.3)
        parts = []
        for model, density in zip((a, b), densities, strict=True):
            delta = model[name].double() - origin
            least = delta.abs().flatten().sort(descending=True).values[max(1, round(density * delta.numel())) - 1]
            parts.append(delta.where(delta.abs() >= least, 0))
        sign = (0.7 * parts[0] + 0.3 * parts[1]).sign()
        agree = [(part.sign() == sign) & (sign != 0) for part in parts]
        total = 0.7 * agree[0].double() + 0.3 * agree[1].double()
        merged = (0.7 * parts[0] * agree[0] + 0.3 * parts[1] * agree[1]) / total.where(total > 0, 1)
        torch.testing.assert_close(found.double(), origin + merged, rtol=0, atol=1e-6, msg=name)


def test_what_mergekit_passes_over_leads_the_notes(service: Service) -> None:
    recipe = MERGEKIT.replace("attention.self", "self_attn") + "random_seed: 1\n"
    job = service.finished(post(service, recipe).json()["id"])
    assert job["status"] == "succeeded", job["error"]
    first, second, *_ = job["result"]["notes"]
    assert first == "random_seed: mergekit passes over it, and so does this merge"
    assert "'*self_attn*' matches no tensor that is merged" in second
    assert second.startswith("models.1.weight.0.filter: ")


def test_weights_below_0_subtract(service: Service, tiny_inputs: Path) -> None:
    recipe = tiny_recipe("a", "b", name="task_arithmetic", scale=0.5)
    recipe["models"][1]["weight"] = [-1, -0.5]
    job = service.finished(service.submit({**recipe, "base": "local:checkpoints/base"}))
    assert job["status"] == "succeeded", job["error"]
    assert [model["weight_share"] for model in job["result"]["models"]] == [None, None]
    artifact = next((service.data_dir / "artifacts").glob(f"{job['id']}.*"))
    base, a, b = (read_model(tiny_inputs / "checkpoints" / name) for name in ("base", "a", "b"))
    name = "bert.embeddings.word_embeddings.weight"
    origin = base.get(name, base.get(name.removeprefix("bert."))).double()  # type: ignore[union-attr]
    merged = origin + 0.5 * (a[name].double() - origin - (b[name].double() - origin))
    torch.testing.assert_close(read_model(artifact / "models" / "a")[name].double(), merged, rtol=0, atol=1e-6)
    refused = service.post("/merge", json={**recipe, "method": {"name": "linear"}, "models": [
        {**model, "weight": weight} for model, weight in zip(recipe["models"], (1, -1), strict=True)
    ]})  # fmt: skip
    assert_problem(refused, 422, "invalid_request")
    assert "the weights add up to 0" in refused.text


def test_the_accepted_recipe_is_ours(service: Service, downloaded: tuple[Path, str]) -> None:
    recipe = json.loads((downloaded[0] / "recipe.json").read_text())
    assert recipe["method"]["scale"] == [{"filter": "*output.dense*", "value": 0.5}, {"filter": "*", "value": 1.0}]
    assert [model["weight"] for model in recipe["models"]] == [
        gradient([0.2, 1.0]), [{"filter": "*attention.self*", "value": 0.0}, {"filter": "*", "value": 0.5}],
    ]  # fmt: skip
    again = service.post("/merge/validate", json=recipe)
    assert again.status_code == 200, again.text
    assert as_recipe(again.json()["request"]) == recipe


def test_shares_of_weights_are_means_over_what_is_merged(service: Service, downloaded: tuple[Path, str]) -> None:
    job = service.get(f"/jobs/{downloaded[1].split()[1]}").json()
    first, second = (model["weight_share"] for model in job["result"]["models"])
    assert first + second == pytest.approx(1)
    assert 0.2 < second < 0.7
    assert job["result"]["method"]["scale"] == job["request"]["method"]["scale"]


BAD_BODIES: dict[str, tuple[str | bytes, int, str, list[str]]] = {
    "not YAML": ("a: [", 400, "malformed", ["not YAML"]),
    "a key twice": ("method: 1\nmethod: 2", 400, "malformed", ["line 2: the key 'method' is there twice"]),
    "too long": ("x" * 200_000, 400, "malformed", ["at most 100000"]),
    "too long for any body": ("x" * 2_000_000, 413, "too_large", ["1000000"]),
    "another encoding": (b"a: \xff", 400, "malformed", ["not UTF-8"]),
    "an alias bomb": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 8)}]"
        for p, c in zip("abcdefg", "bcdefgh", strict=True)), 400, "malformed", ["more than"],
    ),
    "nothing": ("", 422, "invalid_request", []),
    "a list": ("[1, 2]", 422, "invalid_request", []),
    "neither kind of recipe": ("models: []", 422, "invalid_request", ["method"]),
    "both kinds": ("method: {name: average}\nmerge_method: ties", 422, "invalid_request", ["merge_method"]),
    "a method that nobody has": ("merge_method: nearswop", 422, "invalid_request", ["merge_method", "nearswap"]),
    "a path in mergekit's recipe": (
        MERGEKIT.replace("local:checkpoints/a", "/checkpoints/a"), 422, "invalid_request",
        ["models.1.model", "local root"],
    ),
    "a number of mergekit's recipe": (
        MERGEKIT.replace("[0.2, 1.0]", "[0.2, 2000000.0]"), 422, "invalid_request",
        ["models.1.parameters.weight: ", "less than or equal to 1000000"],
    ),
    "a parameter of mergekit's recipe": (
        TIES.replace("{density: 0.3}", "{density: 1.5}"), 422, "invalid_request",
        ['"field": "parameters.density"', "parameters.density: ", "less than or equal to 1"],
    ),
    "a model's own parameter in mergekit's recipe": (
        TIES.replace("[0.9, 0.2]", "[0.9, 1.2]"), 422, "invalid_request",
        ['"field": "models.1.parameters.density"', "models.1.parameters.density: "],
    ),
    "a model of mergekit's recipe": (
        MERGEKIT.replace("local:checkpoints/b\n", "local:checkpoints/none\n"), 422, "invalid_request",
        ["models.2.model: 'local:checkpoints/none' does not exist"],
    ),
    "the base of mergekit's recipe": (
        MERGEKIT.replace("local:checkpoints/base", "local:checkpoints/none"), 422, "invalid_request",
        ["base_model: 'local:checkpoints/none' does not exist"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code", "says"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_yaml_is_refused_by_name(service: Service, body: str, status: int, code: str, says: list[str]) -> None:
    for path in ("/merge", "/merge/validate"):
        response = post(service, body, path)
        assert_problem(response, status, code)
        assert all(word in response.text.encode().decode("unicode_escape") for word in says), response.text


def test_other_routes_take_no_yaml(service: Service) -> None:
    response = post(service, yaml.safe_dump(tiny_recipe("a")), "/scores")
    assert_problem(response, 415, "unsupported_media_type")
    response = post(service, "x", media_type="text/plain")
    assert_problem(response, 415, "unsupported_media_type")
    assert "application/json or application/yaml" in response.json()["detail"]


def layered(**fields: Any) -> dict[str, Any]:
    recipe = tiny_recipe("a", "b", **fields.pop("method", {"name": "average"}))
    recipe["models"][0] |= fields.pop("first", {})
    recipe["models"][1] |= fields.pop("second", {})
    return {**recipe, **fields}


NO_QUERY = [{"filter": "*query*", "value": 0}]
REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "a weight that is none": (
        layered(first={"weight": {"*": 1}}), "models.0.weight", ["give a number, a list of numbers"],
    ),
    "a weight below 0": (layered(first={"weight": [1, -1]}), "models.0.weight.1", ["greater than or equal to 0"]),
    "a value of a filter": (
        layered(first={"weight": [{"filter": "*", "value": [1, -1]}]}), "models.0.weight.0.value.1",
        ["greater than or equal to 0"],
    ),
    "a filter with a typo": (
        layered(first={"weight": [{"filter": "*qeury*", "value": 1}]}), "models.0.weight.0.filter",
        ["'*qeury*' matches no tensor that is merged", "bert."],
    ),
    "a filter of heads, which are not merged": (
        layered(first={"weight": [{"filter": "classifier*", "value": 1}]}), "models.0.weight.0.filter",
        ["that is merged"],
    ),
    "a filter of a parameter": (
        layered(method={"name": "mask_fisher", "floor": [{"filter": "*", "value": 0}, {"filter": "x", "value": 1}]}),
        "method.floor.1.filter", ["'x' matches no tensor"],
    ),
    "a filter of a model's own parameter": (
        layered(
            method={"name": "ties"}, base="local:checkpoints/base",
            second={"parameters": {"density": [{"filter": "*", "value": 0.5}, {"filter": "x", "value": 1}]}},
        ),
        "models.1.parameters.density.1.filter", ["'x' matches no tensor"],
    ),
    "filters without end": (
        layered(
            first={"weight": [{"filter": "*", "value": 1}] * 600},
            second={"weight": [{"filter": "*", "value": 1}] * 600},
        ),
        "", ["1200 filters", "1000 are allowed"],
    ),
    "a model's own parameter beyond its bounds": (
        layered(method={"name": "ties"}, base="local:checkpoints/base", second={"parameters": {"density": [0.5, 2]}}),
        "models.1.parameters.density.1", ["less than or equal to 1"],
    ),
    "a parameter that no model can have of its own": (
        layered(method={"name": "breadcrumbs"}, base="local:checkpoints/base", first={"parameters": {"gama": 0}}),
        "models.0.parameters.gama", ["density and gamma", "did you mean 'gamma'?"],
    ),
    "no weight for some tensors": (
        layered(first={"weight": NO_QUERY}, second={"weight": NO_QUERY}), "models",
        ["are 0 for tensor bert.encoder.layer.0.attention.self.query"],
    ),
    "no weight at one end": (
        layered(first={"weight": [0, 1]}, second={"weight": [0, 0.5]}), "models", ["are 0 for tensor bert.embeddings"],
    ),
    "another number of layers": (layered(layers=7), "layers", [f"the models have {LAYERS} layers, the recipe says 7"]),
    "a scale by layer without a base": (
        layered(method={"name": "average", "scale": [1, 0.5]}), "", ["scale other than 1", "name it as base"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "field", "says"), REFUSED.values(), ids=REFUSED)
def test_parameters_that_fit_no_tensor_are_refused_at_the_door(
    service: Service, recipe: dict[str, Any], field: str, says: list[str]
) -> None:
    response = service.post("/merge/validate", json=recipe)
    assert_problem(response, 422, "invalid_request")
    [error] = response.json()["errors"]
    assert error["field"] == field
    assert all(word in error["message"] for word in says), error


def test_filters_of_scores_are_checked_too(service: Service) -> None:
    recipe = tiny_recipe("a", floor=[{"filter": "x", "value": 0}])
    del recipe["models"][0]["evaluation"]
    response = service.post("/scores", json=recipe)
    assert_problem(response, 422, "invalid_request")
    assert response.json()["errors"][0]["field"] == "method.floor.0.filter"


def test_scores_weights_and_stopping_by_tensor(service: Service) -> None:
    recipe = tiny_recipe("a", "b", floor=[0.0, 0.1])
    recipe["models"][0]["weight"] = [{"filter": "*query*", "value": [3, 1]}, {"filter": "*", "value": 1.5}]
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    assert job["request"]["models"][0]["weight"] == recipe["models"][0]["weight"]
    first, second = job["result"]["models"]
    assert first["weight_share"] + second["weight_share"] == pytest.approx(1)
    assert first["weight_share"] > 0.5
    assert 0 < first["weight_error"] < 0.5


def test_the_command_line_does_not_wait_unless_it_is_asked_to(service: Service, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny_recipe("a", "b", name="average")))
    done = run(service, recipe)
    assert (done.returncode, done.stderr) == (0, "")
    [line] = done.stdout.splitlines()
    assert service.finished(line.removeprefix("job "))["status"] == "succeeded"


def test_the_command_line_says_what_was_refused(service: Service, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TIES.replace("0.7", "[0.7, -2e6]"))
    done = run(service, recipe, "--wait")
    assert (done.returncode, done.stdout) == (1, "")
    assert "models.1.parameters.weight: must be greater than or equal to -1000000" in done.stderr
    recipe.write_text("merge_method: linear\nmodels: [{model: lm/nothere, parameters: {weight: 1}}]")
    assert "there is no folder 'lm/nothere' here" in run(service, recipe).stderr
    done = run(service, tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "none.yaml" in done.stderr


def test_the_command_line_says_that_the_job_failed(service: Service, tmp_path: Path) -> None:
    spoilt = service.inputs / "checkpoints" / tmp_path.name
    shutil.copytree(service.inputs / "checkpoints" / "a", spoilt)
    bias = "bert.pooler.dense.bias"
    edit_tensors(spoilt, lambda tensors: {**tensors, bias: torch.full_like(tensors[bias], torch.nan)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MERGEKIT.replace("local:checkpoints/a", f"local:checkpoints/{tmp_path.name}"))
    done = run(service, recipe, "--output", str(tmp_path / "artifact"))
    shutil.rmtree(spoilt)
    assert done.returncode == 3
    assert done.stderr.startswith("maskmerge: invalid_checkpoint: ")
    assert bias in done.stderr
    assert not (tmp_path / "artifact").exists()


def test_the_command_line_says_that_no_service_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    assert main(["submit", str(tmp_path / "recipe.json"), "--url", "http://127.0.0.1:1"]) == 6
    assert "`maskmerge serve` starts a service" in capsys.readouterr().err


def fetched(service: Service, job_id: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "app.cli", "download", job_id, "--output", str(folder)]
    command += ["--url", f"http://127.0.0.1:{service.port}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=HANGS_S)


def jobs_of(service: Service) -> set[str]:
    with Client(f"http://127.0.0.1:{service.port}") as client:
        return {job.id for job in client.jobs()}


def test_an_output_that_is_taken_is_refused_before_anything_is_posted(service: Service, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MERGEKIT)
    before = jobs_of(service)
    for taken in (tmp_path, recipe):
        done = run(service, recipe, "--output", str(taken))
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{taken} is there already" in done.stderr
    assert jobs_of(service) == before


def test_a_job_is_fetched_later_and_what_is_there_is_kept(service: Service, tmp_path: Path) -> None:
    job = service.finished(service.submit(tiny_recipe("a", "b", name="average")))
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = fetched(service, job["id"], whole)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.copytree(whole, part)
    (part / "recipe.json").unlink()
    kept = part / "models" / "a" / "config.json"
    inode = kept.stat().st_ino
    assert fetched(service, job["id"], part).returncode == 0
    files = {path.relative_to(part): path.read_bytes() for path in part.rglob("*") if path.is_file()}
    assert files == {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert kept.stat().st_ino == inode
    kept.write_text("{}")
    done = fetched(service, job["id"], part)
    assert done.returncode == 1
    assert f"{kept} is there with other content" in done.stderr
    assert kept.read_text() == "{}"
    assert "there is no job" in fetched(service, "0" * 28, part).stderr


def test_a_file_that_arrives_otherwise_than_announced_has_no_name(service: Service, tmp_path: Path) -> None:
    job = service.finished(service.submit(tiny_recipe("a", "b", name="average")))
    folder = next((service.data_dir / "artifacts").glob(f"{job['id']}.*"))
    report = folder / "report.html"
    report.write_bytes(report.read_bytes().replace(b"maskmerge", b"MASKMERGE"))
    done = fetched(service, job["id"], tmp_path / "out")
    assert done.returncode == 1
    assert "report.html did not arrive as announced" in done.stderr
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "recipe.json" in names
    assert not [name for name in names if "report.html" in name]


def test_an_interrupted_download_says_how_to_go_on(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    recipe, url = tmp_path / "recipe.yaml", f"http://127.0.0.1:{service.port}"
    recipe.write_text(MERGEKIT)
    monkeypatch.setattr(downloads, "_fetch", interrupted)
    assert main(["submit", str(recipe), "--url", url, "--output", str(tmp_path / "out")]) == 130
    printed = capsys.readouterr()
    job = printed.out.splitlines()[0].removeprefix("job ")
    command = f"maskmerge download {job} --output {tmp_path / 'out'} --url {url}"
    assert f"the job succeeded; `{command}` fetches what is missing" in printed.err
    monkeypatch.undo()
    assert main(command.split()[1:]) == 0
    assert (tmp_path / "out" / "manifest.json").exists()


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of what answers so to whatever it is asked."""

    def serve() -> None:
        with suppress(OSError):  # it does not listen any more
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):  # closed before all was read, it would take the answer back
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "is no maskmerge service: it answers 200"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\n\r\n{}", "is no maskmerge service"),
        (b"", "if the job was queued all the same, `maskmerge list` shows it"),
    ],
    ids=["a page", "another service", "nothing"],
)  # fmt: skip
def test_the_command_line_says_what_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: bytes, says: str
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{}")
    with answering(answer) as url:
        assert main(["submit", str(recipe), "--url", url]) == 6
    assert says in capsys.readouterr().err


def test_models_with_long_names_give_a_job_that_runs(service: Service) -> None:
    recipe = tiny_recipe("a", "a", "a", "a", name="average")
    for number, model in enumerate(recipe["models"]):
        model["name"] = f"{number:060}"
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    assert len(job["name"]) == 200


def test_paths_in_a_recipe_are_related_to_the_local_root(service: Service, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = MERGEKIT.replace("local:checkpoints/b\n", f"{service.inputs}/checkpoints/b\n")
    recipe.write_text(text)
    done = run(service, recipe, "--wait")
    assert done.returncode == 1
    assert "models.2.model" in done.stderr
    assert "--local-root DIR" in done.stderr
    done = run(service, recipe, "--wait", "--local-root", str(service.inputs))
    assert done.returncode == 0, done.stderr
    job = service.get(f"/jobs/{done.stdout.split()[1]}").json()
    assert [model["checkpoint"] for model in job["request"]["models"]] == ["local:checkpoints/a", "local:checkpoints/b"]
