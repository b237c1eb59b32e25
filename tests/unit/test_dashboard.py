"""What the dashboard guesses, and what it makes of a form and of a recipe."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from app.contracts.jobs import JobKind
from app.dashboard.drafts import NO_COLUMN, drafted
from app.dashboard.recipes import ways_to_send
from app.services.browsing import found_below
from app.services.previews import Preview, guessed
from worker.engine.catalog.tasks import TASKS

READERS = {task.name: task.rows for task in TASKS}


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("classification", {"sentence": "x", "Label": 1}, {"text": "sentence", "text_pair": None, "label": "Label"}),
        (
            "classification",
            {"idx": 3, "sentence2": "y", "sentence1": "x", "label": 0},
            {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        ),
        ("classification", {"id": 7, "tweet": "x"}, {"text": "tweet", "text_pair": None, "label": None}),
        (
            "question answering",
            {"question": "x", "context": "y", "answers": {}},
            {"question": "question", "context": "context", "answers": "answers"},
        ),
        ("language model", {"messages": []}, {"text": None, "target": None, "messages": "messages"}),
    ],
)
def test_columns_are_guessed_by_name_and_else_by_value(
    task: str, row: dict[str, object], expected: dict[str, str | None]
) -> None:
    reader = next(rows for name, rows in READERS.items() if name.replace("_", " ").endswith(task))
    assert guessed(reader, list(row), row) == expected


def test_a_form_makes_the_recipe_that_it_shows() -> None:
    fields = [
        ("models.0.checkpoint", " local:experts/sst 2@main "), ("models.0.weight", "0.5"), ("models.0.name", ""),
        ("models.2.checkpoint", "job:1/b"), ("models.2.name", "b"), ("models.2.dataset.source", "local:b.jsonl"),
        ("models.2.dataset.label", NO_COLUMN), ("models.4.checkpoint", "gone"), ("method", "ties"),
        ("method.density", "[0.1, 0.2]"), ("method.examples", "1"), ("labels", "team:search, run:3"),
        ("do", "remove-4"),
    ]  # fmt: skip
    draft = drafted(fields)
    draft.previews["models.1.dataset"] = Preview(settings={"text": "sentence", "text_pair": None, "label": "y"})
    assert draft.recipe == {
        "method": {"name": "ties", "density": [0.1, 0.2]},
        "labels": {"team": "search", "run": "3"},
        "models": [
            {"name": "sst-2", "checkpoint": "local:experts/sst 2@main", "weight": 0.5},
            {"name": "b", "checkpoint": "job:1/b", "dataset": {"source": "local:b.jsonl", "text": "sentence"}},
        ],
    }
    assert drafted([*fields[:-1], ("do", "add")]).models == 4
    assert drafted([("do", "remove-0"), ("models.0.checkpoint", "x")]).models == 1


def test_every_way_to_send_a_recipe_sends_that_recipe_whatever_is_in_it() -> None:
    name = '"""\nimport os\nEND\n\'; echo \\ é'
    recipe = {"name": name, "method": {"name": "average"}, "models": [{"name": "a", "checkpoint": "local:a"}]}
    ways = dict(ways_to_send(recipe, JobKind.MERGE))
    assert yaml.safe_load(ways["YAML"]) == recipe
    [heredoc] = [ways["curl"].partition("<<'END'\n")[2].removesuffix("\nEND")]
    assert json.loads(heredoc) == recipe
    assert "END" not in heredoc.splitlines()
    program = ast.parse(ways["Python"])
    assert [type(node) for node in program.body] == [ast.ImportFrom, ast.Assign, ast.With]
    assigned = program.body[1]
    assert isinstance(assigned, ast.Assign)
    assert ast.literal_eval(assigned.value) == recipe


def test_checkpoints_and_rows_are_found_and_nothing_outside_the_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    files = [
        "base/config.json", "experts/a/config.json", "experts/a/rows.jsonl", "experts/lora/adapter_config.json",
        "tasks/x.jsonl", "tasks/y.CSV", "tasks/notes.txt", ".cache/z.jsonl",
    ]  # fmt: skip
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("{}")
    (outside / "secret").mkdir(parents=True)
    (outside / "secret" / "config.json").write_text("{}")
    (root / "link").symlink_to(outside)
    found = found_below([root, tmp_path / "missing"])
    assert found.checkpoints == ["local:base", "local:experts/a", "local:experts/lora"]
    assert found.datasets == ["local:tasks/x.jsonl", "local:tasks/y.CSV"]
    assert found.is_whole
