"""The programs of `examples/` do what they say, at a smaller size; the README's test runs the demo."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from maskmerge import Client
from nbclient import NotebookClient

from tests.conftest import HANGS_S, REPOSITORY, Service, free_port, make_service, wait_until

EXAMPLES = REPOSITORY / "examples"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that has no local folder of the examples, so that whatever it is to read must be uploaded."""
    root = tmp_path_factory.mktemp("examples")
    (root / "inputs").mkdir()
    service = make_service(root, root / "inputs")
    service.start()
    yield service
    service.stop()


def printed_by(service: Service, script: str, *options: str) -> str:
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *options],
        env={**os.environ, "MASKMERGE_URL": service.url, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=True,
    ).stdout


def numbers_of(printed: str, line: str) -> list[float]:
    """The numbers in this line of the table."""
    [found] = re.findall(rf"│ {re.escape(line)} +│(.+)│", printed)
    return [float(number) for number in found.split("│")]


def test_sentiment_experts_merge_without_a_label(service: Service, tmp_path: Path) -> None:
    options = ("--dir", str(tmp_path), "--train-rows", "96", "--validation-rows", "60")
    printed = printed_by(service, "sentiment.py", *options)
    for model in ("legacy_airlines expert", "average merge", "regmean merge"):
        *domains, mean = numbers_of(printed, model)
        assert len(domains) == 3
        assert mean == pytest.approx(sum(domains) / 3, abs=1e-3)
        assert mean > 0.55  # where a guess has half of them right
    with Client(service.url) as client:
        models = [model for job in client.jobs() for model in client.job(job.id).request["models"]]
    assert [model["evaluation"] for model in models] == [None] * 6
    sent = [json.loads(line) for path in tmp_path.glob("tasks/*/texts.jsonl") for line in path.read_text().splitlines()]
    assert [list(row) for row in sent] == [["text"]] * 3 * 96
    assert (Path(printed.splitlines()[-1].removeprefix("The merge is in ")) / "model.safetensors").is_file()


def test_language_models_merge(service: Service, tmp_path: Path) -> None:
    printed = printed_by(service, "language_models.py", "--dir", str(tmp_path))
    for domain in ("news", "tweets"):
        base, expert, average, merge = numbers_of(printed, domain)
        assert expert < merge < average
        assert merge < base
    assert (Path(printed.splitlines()[-1].removeprefix("The merge is in ")) / "model.safetensors").is_file()


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "first_merge.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    port = free_port()
    [settings] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    wanted = {"FOLDER": f"Path({str(tmp_path)!r})", "URL": repr(f"http://127.0.0.1:{port}"), "TRAIN_ROWS": "64"}
    for name, value in wanted.items():
        settings.source, changed = re.subn(rf"^{name} = .*$", f"{name} = {value}", settings.source, flags=re.M)
        assert changed == 1
    NotebookClient(notebook, timeout=int(HANGS_S), resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "\n".join(output.get("text") or output["data"]["text/plain"] for output in outputs)
    assert "topics: BertForSequenceClassification; its head: " in printed
    assert re.search(r"^ *\d+% scoring$", printed, re.M)
    assert re.search(r"^100% done$", printed, re.M)
    assert re.search(r"│ accuracy │ +0\.\d{4} │", printed)  # in the table of what was kept
    assert re.search(r"^The striker scored twice before half-time\. \w+ \(0\.\d\d\)$", printed, re.M)
    with Client(f"http://127.0.0.1:{port}") as client:
        wait_until(lambda: not client.is_ready(), "the service to end with the kernel that started it")
