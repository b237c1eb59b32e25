"""Data sets as people have them: CSV and Parquet, labels by name, labels in another order, rows too long."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow.parquet import write_table

from tests.conftest import Service, tiny_recipe
from tests.tiny import POSITIONS, Tensors, edit_tensors, tiny_checkpoint, write_lines

NAMES = ["bad", "good"]


def rows_of(inputs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (inputs / "rows" / "a.jsonl").read_text().splitlines()]


def merged(service: Service, recipe: dict[str, Any]) -> dict[str, Any]:
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    result: dict[str, Any] = job["result"]
    return result


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_merge_is_the_same_in_whichever_format_the_rows_come(
    service: Service, tiny_inputs: Path, suffix: str
) -> None:
    rows = rows_of(tiny_inputs)
    file = tiny_inputs / "rows" / f"same{suffix}"
    if suffix == ".parquet":
        write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        separator = "," if suffix == ".csv" else "\t"
        write_lines(file, [f"text{separator}label", *(f"{row['text']}{separator}{row['label']}" for row in rows)])
    recipe = tiny_recipe("a", "b", estimator="empirical", precision="float32")
    expected = merged(service, recipe)
    recipe["models"][0]["dataset"]["source"] = recipe["models"][0]["evaluation"]["source"] = f"local:rows/same{suffix}"
    found = merged(service, recipe)
    assert found["metrics"] == expected["metrics"]
    assert [m["weight_share"] for m in found["models"]] == [m["weight_share"] for m in expected["models"]]
    # Each model's evaluation is 50 rows of its own data set.
    held_out = "50 rows of local:rows/{} are rows that {} is evaluated on; nothing was fitted to them"
    assert expected["notes"] == [held_out.format(f"{name}.jsonl", name) for name in ("a", "b")]
    assert found["notes"] == [held_out.format(f"same{suffix}", "a"), held_out.format("b.jsonl", "b")]


def test_labels_by_name_are_the_checkpoints_and_another_order_is_reported(service: Service, tiny_inputs: Path) -> None:
    tiny_checkpoint(tiny_inputs / "checkpoints" / "named", names=NAMES)
    rows = rows_of(tiny_inputs)
    names = write_lines(
        tiny_inputs / "rows" / "names.csv", ["text,label", *(f"{row['text']},{NAMES[row['label']]}" for row in rows)]
    )
    write_lines(
        tiny_inputs / "rows" / "other-way.csv", ["text,label", *(f"{row['text']},{1 - row['label']}" for row in rows)]
    )
    recipe = tiny_recipe("a", name="average")
    recipe["models"][0]["checkpoint"] = "local:checkpoints/named"
    expected = merged(service, recipe)["metrics"]["a"]
    evaluation = recipe["models"][0]["evaluation"]
    evaluation["source"] = f"local:rows/{names.name}"
    assert merged(service, recipe)["metrics"]["a"] == expected
    evaluation["source"] = "local:rows/other-way.csv"
    evaluation["label_names"] = NAMES[::-1]
    found = merged(service, recipe)
    assert found["metrics"]["a"] == expected
    assert [note for note in found["notes"] if "ids 0 to 1 are the checkpoint's 1, 0" in note], found["notes"]
    evaluation["metric"] = "f1"
    first = merged(service, recipe)["notes"][0]
    assert "f1 of local:rows/other-way.csv is of the checkpoint's label 1, good, which is not the data" in first, first


def test_labels_that_mean_something_else_to_the_checkpoint_are_reported(service: Service, tiny_inputs: Path) -> None:
    """A head that says the opposite of the ids in the rows, which no name gives away."""
    folder = tiny_checkpoint(tiny_inputs / "checkpoints" / "opposite")

    def certain(tensors: Tensors) -> None:
        tensors["classifier.weight"].zero_()
        tensors["classifier.bias"].copy_(tensors["classifier.bias"].new_tensor([5.0, -5.0]))

    edit_tensors(folder, certain)  # always label 0, in rows that are nearly all labelled 1
    labels = [1] * 45 + [0] * 5
    texts = [row["text"] for row in rows_of(tiny_inputs)]
    write_lines(
        tiny_inputs / "rows" / "opposite.csv",
        ["text,label", *(f"{text},{label}" for text, label in zip(texts[:50], labels, strict=True))],
    )
    recipe = tiny_recipe("a", name="average")
    recipe["models"][0]["checkpoint"] = "local:checkpoints/opposite"
    recipe["models"][0]["evaluation"] = {"source": "local:rows/opposite.csv"}
    notes = merged(service, recipe)["notes"]
    assert [note for note in notes if "labels 0 to 1 are read as 1, 0" in note], notes


@pytest.mark.parametrize(
    ("label", "metric", "leads"),
    [
        (
            1,
            "matthews",
            "all labels of local:rows/one.jsonl are the same, so matthews is not defined, and is given as 0",
        ),
        (0, "f1", "no row of local:rows/one.jsonl has the label 1, so f1, which is of that label, is 0"),
    ],
)
def test_a_metric_that_equal_labels_make_0_is_led_by_a_note(
    service: Service, tiny_inputs: Path, label: int, metric: str, leads: str
) -> None:
    rows = [{**row, "label": label} for row in rows_of(tiny_inputs)]
    write_lines(tiny_inputs / "rows" / "one.jsonl", [json.dumps(row) for row in rows])
    recipe = tiny_recipe("a", name="average")
    recipe["models"][0]["evaluation"] |= {"source": "local:rows/one.jsonl", "metric": metric}
    found = merged(service, recipe)
    assert found["metrics"]["a"]["expert"] == 0
    assert found["notes"][0] == leads or found["notes"][1] == leads, found["notes"]


def test_truth_values_for_labels_of_other_names_are_led_by_a_note(service: Service, tiny_inputs: Path) -> None:
    tiny_checkpoint(tiny_inputs / "checkpoints" / "named", names=NAMES)
    rows = [{**row, "label": bool(row["label"])} for row in rows_of(tiny_inputs)]
    write_lines(tiny_inputs / "rows" / "truths.jsonl", [json.dumps(row) for row in rows])
    recipe = tiny_recipe("a", name="average")
    recipe["models"][0]["checkpoint"] = "local:checkpoints/named"
    expected = merged(service, recipe)["metrics"]["a"]
    recipe["models"][0]["evaluation"]["source"] = "local:rows/truths.jsonl"
    found = merged(service, recipe)
    assert found["metrics"]["a"] == expected
    assert found["notes"][0] == (
        "the labels of local:rows/truths.jsonl are true and false, and the checkpoint has other names: true was "
        "taken as the label 1, good, and false as the label 0, bad"
    )


def test_rows_over_the_models_limit_are_truncated_and_counted(service: Service, tiny_inputs: Path) -> None:
    texts = ["one " * words for words in (3, POSITIONS - 2, 60, 90)]
    write_lines(tiny_inputs / "rows" / "long.csv", ["text,label", *(f"{text},0" for text in texts)])
    recipe = {**tiny_recipe("a"), "output": {"align_heads": False}}
    recipe["models"][0]["dataset"] = {"source": "local:rows/long.csv"}
    del recipe["models"][0]["evaluation"]
    notes = merged(service, recipe)["notes"]
    assert notes == [f"2 of 4 rows of local:rows/long.csv are longer than {POSITIONS} tokens and were truncated"]


NLI = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]


def named_rows(inputs: Path, file: str, names: list[str]) -> str:
    """Rows in a Parquet file that says what it calls the ids of its labels."""
    rows = rows_of(inputs)[:60]
    columns = {"text": [row["text"] for row in rows], "label": [index % len(names) for index in range(len(rows))]}
    labels = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(columns, labels).to_parquet(inputs / "rows" / file)
    return f"local:rows/{file}"


def test_names_that_differ_in_case_are_the_same_labels(service: Service, tiny_inputs: Path) -> None:
    tiny_checkpoint(tiny_inputs / "checkpoints" / "nli", names=NLI)
    found = []
    for file, names in (("same.parquet", NLI), ("glue.parquet", [name.lower() for name in NLI])):
        recipe = tiny_recipe("a", name="average")
        recipe["models"][0]["checkpoint"] = "local:checkpoints/nli"
        recipe["models"][0]["evaluation"] = {"source": named_rows(tiny_inputs, file, names)}
        found.append(merged(service, recipe)["metrics"]["a"])
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["average", "mask_fisher", "auto"])
def test_where_names_tell_that_labels_differ_there_is_no_number(
    service: Service, tiny_inputs: Path, method: str
) -> None:
    tiny_checkpoint(tiny_inputs / "checkpoints" / "nli", names=NLI)
    recipe = tiny_recipe("a", name=method)
    model = recipe["models"][0]
    model["checkpoint"] = "local:checkpoints/nli"
    model["evaluation"] = {"source": named_rows(tiny_inputs, "topics.parquet", ["world", "sports", "business"])}
    if method == "mask_fisher":  # it is measured with the labels, and not evaluated
        recipe["method"]["estimator"] = "empirical"
        model["dataset"] = {**model.pop("evaluation"), "label": "label"}
    job = service.finished(service.submit(recipe))
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_dataset"), job["error"]
    message = job["error"]["message"]
    assert not [word for word in ("world, sports, business", *NLI, "label_names") if word not in message], message


def test_a_doubt_leads_the_notes_the_report_and_the_model_card(service: Service, tiny_inputs: Path) -> None:
    recipe = tiny_recipe("a", name="average")
    del recipe["models"][0]["dataset"]
    recipe["models"][0]["evaluation"] = {"source": named_rows(tiny_inputs, "moods.parquet", ["glum", "glad"])}
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    first, *rest = job["result"]["notes"]
    assert not [word for word in ("glum, glad", "not certain", "label_names") if word not in first], first
    assert rest
    page = service.get(job["links"]["report"]).text
    assert page.index("glum, glad") < page.index('id="retention"')
    card = service.get(f"{job['links']['artifacts']}/README.md").text
    assert card.index("glum, glad") < card.index("| merged")


def test_quotes_between_tabs_make_no_other_rows(service: Service, tiny_inputs: Path) -> None:
    rows = [{"text": f'"{row["text"]}' if index % 3 else f'{row["text"]}"', "label": row["label"]}
            for index, row in enumerate(rows_of(tiny_inputs)[:60])]  # fmt: skip
    write_lines(tiny_inputs / "rows" / "quotes.jsonl", [json.dumps(row) for row in rows])
    lines = [f"{row['text']}\t{row['label']}" for row in rows]
    write_lines(tiny_inputs / "rows" / "quotes.tsv", ["text\tlabel", *lines])
    found = []
    for suffix in (".jsonl", ".tsv"):
        recipe = tiny_recipe("a", name="average")
        recipe["models"][0]["evaluation"] = {"source": f"local:rows/quotes{suffix}"}
        found.append(merged(service, recipe)["metrics"]["a"])
    assert found[0] == found[1]
    assert found[0]["examples"] == 60
