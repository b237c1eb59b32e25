"""Rows of images on the running service: they are merged on and judged, and bad ones fail their job by their line."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Service, assert_problem
from tests.tiny import tiny_checkpoint, write_lines
from tests.tiny_families import TINY_VISION

Recipe = dict[str, Any]
NAMES = ("cat", "dog")
BAD = {"cut": "damaged", "gif": "no image of a known format"}


def encoded(seed: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """Two models, with rows beside the service's other inputs, and rows of which the 151st is bad."""
    rows = tiny_inputs / "rows"
    (rows / "images").mkdir(parents=True)
    lines = [json.dumps({"picture": f"images/{index}.png", "label": NAMES[index % 2]}) for index in range(60)]
    for index in range(60):
        (rows / "images" / f"{index}.png").write_bytes(encoded(index))
    (rows / "images" / "cut").write_bytes(encoded(0)[:200])
    (rows / "images" / "gif").write_bytes(encoded(0, "GIF"))
    for seed in (1, 2):
        folder = tiny_inputs / "checkpoints" / f"vit-{seed}"
        tiny_checkpoint(folder, family=TINY_VISION["vit"], seed=seed, names=NAMES, task="ImageClassification")
    write_lines(rows / "images.jsonl", lines)
    for name in BAD:
        bad = json.dumps({"picture": f"images/{name}", "label": "cat"})
        write_lines(rows / f"images-{name}.jsonl", [*(lines * 3)[:150], bad])
    write_lines(
        rows / "images-out.jsonl", [json.dumps({"picture": "../checkpoints/vit-1/config.json", "label": "cat"})]
    )
    return tiny_inputs


def recipe(rows: str = "images", method: Recipe | None = None) -> Recipe:
    models = []
    for name in ("vit-1", "vit-2"):
        source = {"source": f"local:rows/{rows}.jsonl", "image": "picture", "label": "label"}
        evaluation = {"source": "local:rows/images.jsonl", "image": "picture", "limit": 40}
        models.append(
            {"name": name, "checkpoint": f"local:checkpoints/{name}", "dataset": source, "evaluation": evaluation}
        )
    return {"method": method or {"name": "mask_fisher", "examples": 40}, "models": models}


def test_two_models_merge_and_are_evaluated(service: Service, inputs: Path) -> None:
    job = service.finished(service.submit(recipe()))
    assert job["status"] == "succeeded", job["error"]
    for found in job["result"]["metrics"].values():
        assert found["metric"] == "accuracy"
        assert found["examples"] == 40
        assert found["interval"][0] <= found["merged"] <= found["interval"][1]


def test_auto_searches(service: Service, inputs: Path) -> None:
    method = {"name": "auto", "candidates": ["average", "mask_fisher"], "trials": 4}
    job = service.finished(service.submit(recipe(method=method)))
    assert job["status"] == "succeeded", job["error"]
    assert set(job["result"]["metrics"]) == {"vit-1", "vit-2"}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_image_fails_the_job_by_its_line(service: Service, inputs: Path, fault: str) -> None:
    job = service.finished(service.submit(recipe(f"images-{fault}")))
    assert job["status"] == "failed"
    assert job["error"]["code"] == "invalid_dataset"
    assert "line 151: column 'picture'" in job["error"]["message"]
    assert BAD[fault] in job["error"]["message"]
    assert service.get("/readyz").status_code == 200


def test_a_path_out_of_the_folder_is_refused_before_the_job_is_accepted(service: Service, inputs: Path) -> None:
    answer = service.post("/merge", json=recipe("images-out"))
    assert_problem(answer, 422, "invalid_dataset")
    assert "line 1: column 'picture' is a path out of the data set's folder" in answer.text
