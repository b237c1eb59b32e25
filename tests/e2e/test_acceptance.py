"""Merges that reach what their request asks for, and merges that do not."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.cli.exits import Exit
from tests.conftest import Service, tiny_recipe


@pytest.mark.parametrize(
    "method",
    [
        {"name": "average"},
        pytest.param({"name": "auto", "candidates": ["average"], "trials": 1}, marks=pytest.mark.long),
    ],
)
def test_a_merge_says_whether_it_is_accepted_and_is_written_all_the_same(
    service: Service, tmp_path: Path, method: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {**tiny_recipe("a", "b", name="average"), "method": method}
    for floor, accepted in ((0.0, True), (2.0, False)):
        job = service.finished(service.submit({**recipe, "accept": {"min_mean_retention": floor}}))
        result = job["result"]
        assert (job["status"], result["accepted"]) == ("succeeded", accepted)
        told = [note for note in result["notes"] if "not accepted" in note]
        assert told == ([] if accepted else result["notes"][:1])
        mean = f"{result['mean_retention']:.4f}"
        assert accepted or told == [f"the merge is not accepted: the mean retention is {mean}, and 2 is asked for"]
        files = service.get(f"/jobs/{job['id']}/artifacts").json()["files"]
        assert any(file["name"].endswith(".safetensors") for file in files)
        path = tmp_path / f"{accepted}.json"
        path.write_text(json.dumps({**recipe, "accept": {"min_mean_retention": floor}}))
        assert main(["submit", str(path), "--url", service.url, "--wait"]) == (
            Exit.OK if accepted else Exit.NOT_ACCEPTED
        )
    assert "not accepted" in capsys.readouterr().out
