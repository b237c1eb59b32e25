"""Families other than BERT, on the running service."""

from pathlib import Path

import pytest

from tests.conftest import Service, tiny_recipe
from tests.tiny import tiny_checkpoint, write_rows
from tests.tiny_families import TINY_FAMILIES

LABELS = {"x": 2, "y": 3}


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """`roberta-x`, `roberta-y`, `deberta-v3-x`, `deberta-v3-y` beside the service's other inputs."""
    for family in ("roberta", "deberta-v3"):
        for seed, (suffix, labels) in enumerate(LABELS.items()):
            name = f"{family}-{suffix}"
            tiny_checkpoint(tiny_inputs / "checkpoints" / name, family=TINY_FAMILIES[family], labels=labels, seed=seed)
            write_rows(tiny_inputs / "rows" / f"{name}.jsonl", count=50, labels=labels, seed=seed)
    return tiny_inputs


@pytest.mark.parametrize("family", ["roberta", "deberta-v3"])
def test_two_experts_of_the_family_merge_and_are_measured(service: Service, inputs: Path, family: str) -> None:
    names = [f"{family}-{suffix}" for suffix in LABELS]
    job = service.finished(service.submit(tiny_recipe(*names)))
    assert job["status"] == "succeeded", job["error"]
    assert set(job["result"]["metrics"]) == set(names)
    files = {file["name"] for file in service.get(job["links"]["artifacts"]).json()["files"]}
    assert {f"models/{name}/tokenizer.json" for name in names} <= files
    config = service.get(f"{job['links']['artifacts']}/models/{names[1]}/config.json").json()
    assert config["model_type"] == TINY_FAMILIES[family].model_type


def test_two_families_are_refused_before_the_job_is_accepted(service: Service, inputs: Path) -> None:
    response = service.post("/merge", json=tiny_recipe("roberta-x", "deberta-v3-x"))
    assert response.status_code == 422
    assert "architectures differ: roberta, deberta-v2" in response.text
