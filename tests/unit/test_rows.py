"""Rows of JSON lines: which they are, in which order, and every way in which a line is refused by its number."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import dataset_spec, write_lines
from worker.engine.catalog.data.formats import MAX_ROW_BYTES
from worker.engine.catalog.data.rows import FIRST_ROWS, Row, RowFile, check_first_rows, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.tasks import Classification, LabelMap
from worker.engine.inputs.tables import read_parquet

TWO_LABELS = LabelMap(Classification(2, {"no": 0, "yes": 1}))
THREE_ROWS = [{"text": "one two", "label": 0}, {"text": "žluť 猫 🙂", "label": 1}, {"text": "", "label": 0}]


def file_of(folder: Path, content: bytes) -> Path:
    file = folder / "rows.jsonl"
    file.write_bytes(content)
    return file


def joined(separator: str, end: str = "") -> bytes:
    return (separator.join(json.dumps(row, ensure_ascii=False) for row in THREE_ROWS) + end).encode()


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (joined("\n", "\n"), [1, 2, 3]),
        (joined("\n"), [1, 2, 3]),
        (joined("\r\n", "\r\n"), [1, 2, 3]),
        (b"\xef\xbb\xbf" + joined("\n"), [1, 2, 3]),
        (b"\xef\xbb\xbf" + joined("\r\n", "\r\n"), [1, 2, 3]),
        (b"\n \r\n" + joined("\n\n\t\n", "\n\n"), [3, 6, 9]),
    ],
    ids=["lf", "no last newline", "crlf", "byte order mark", "byte order mark and crlf", "blank lines"],
)
def test_rows_are_the_same_however_the_file_ends_its_lines(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    rows = RowFile(dataset_spec(file_of(tmp_path, content)))
    expected = [
        Row(Place("line", line), str(row["text"]), None, row["label"])
        for line, row in zip(lines, THREE_ROWS, strict=True)
    ]
    assert len(rows) == 3
    assert rows.read([0, 1, 2]) == expected
    assert rows.read([2, 0, 2]) == [expected[2], expected[0], expected[2]]
    check_first_rows(dataset_spec(file_of(tmp_path, content)), TWO_LABELS)


def test_only_the_asked_columns_are_read(tmp_path: Path) -> None:
    line = json.dumps({"a": "first", "b": "second", "c": "yes", "text": 7})
    file = write_lines(tmp_path / "rows.jsonl", [line])
    assert RowFile(dataset_spec(file, text="a", label=None)).read([0]) == [Row(Place("line", 1), "first", None, None)]
    assert RowFile(dataset_spec(file, text="b", text_pair="a", label="c")).read([0]) == [
        Row(Place("line", 1), "second", "first", "yes")
    ]


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", [json.dumps({"text": str(i), "label": 0}) for i in range(100)])


def sampled(spec: DatasetSpec, count: int | None = None) -> list[Row]:
    return sample(RowFile(spec), spec, count)


def test_a_sample_is_without_replacement_and_fewer_rows_are_a_prefix_of_more(hundred: Path) -> None:
    all_of_them = sampled(dataset_spec(hundred))
    assert sorted(row.place.number for row in all_of_them) == list(range(1, 101))
    assert [row.place.number for row in all_of_them] != list(range(1, 101))
    assert sampled(dataset_spec(hundred), 30) == all_of_them[:30]
    assert sampled(dataset_spec(hundred), 1000) == all_of_them
    assert sampled(dataset_spec(hundred, limit=20), 30) == all_of_them[:20]
    assert sampled(dataset_spec(hundred, limit=40), 30) == all_of_them[:30]


def test_the_order_follows_from_the_seed(hundred: Path) -> None:
    first, second = (sampled(dataset_spec(hundred, seed=seed)) for seed in (1, 2))
    assert first != second
    assert sampled(dataset_spec(hundred, seed=1)) == first


def test_without_shuffling_the_first_rows_are_taken_in_order(hundred: Path) -> None:
    spec = dataset_spec(hundred, limit=50)
    rows = RowFile(spec)
    assert [row.place.number for row in sample(rows, spec, 7, shuffle=False)] == list(range(1, 8))
    assert len(sample(rows, spec, None, shuffle=False)) == 50


BAD_LINES: dict[str, tuple[bytes, dict[str, Any], list[str]]] = {
    "not JSON": (b"{oops", {}, ["not a JSON object"]),
    "cut": (b'{"text": "on', {}, ["not a JSON object"]),
    "not UTF-8": ('{"text": "é", "label": 0}'.encode("latin-1"), {}, ["not a JSON object"]),
    "deeply nested": (b"[" * 200_000, {}, ["not a JSON object"]),
    "a list": (b'["one", 0]', {}, ["not a JSON object"]),
    "a number too long": (b'{"text": "a", "label": ' + b"1" * 5000 + b"}", {}, ["not a JSON object"]),
    "no text column": (b'{"txt": "one", "label": 0}', {}, ["no column 'text'", "did you mean 'txt'?"]),
    "no pair column": (b'{"text": "one", "label": 0}', {"text_pair": "second"}, ["no column 'second'", "label, text"]),
    "no label column": (b'{"text": "one"}', {"label": "gold"}, ["no column 'gold'"]),
    "a number as text": (b'{"text": 5, "label": 0}', {}, ["column 'text' is not text"]),
    "null as pair": (b'{"text": "a", "b": null, "label": 0}', {"text_pair": "b"}, ["column 'b' is not text"]),
    # Valid JSON, but no text: no encoding has it, and no tokenizer takes it.
    "half a surrogate pair": (b'{"text": "\\ud800", "label": 0}', {}, ["text"]),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, case: str) -> None:
    line, columns, words = BAD_LINES[case]
    good = b'{"text": "one", "label": 0, "second": "two", "gold": 1, "b": "three"}\n'
    spec = dataset_spec(file_of(tmp_path, good + b"\n" + line + b"\n"), **columns)
    rows = RowFile(spec)
    assert rows.read([0])[0].place.number == 1
    for read in (lambda: rows.read([1]), lambda: check_first_rows(spec, TWO_LABELS)):
        with pytest.raises(InvalidDataset) as caught:
            read()
        assert caught.value.detail["line"] == 3
        missing = [word for word in ("rows.jsonl, line 3", *words) if word not in caught.value.message]
        assert not missing, caught.value.message


def test_nothing_of_a_text_is_in_a_message(tmp_path: Path) -> None:
    rows = RowFile(dataset_spec(file_of(tmp_path, b'{"text": "a secret" oops')))
    with pytest.raises(InvalidDataset) as caught:
        rows.read([0])
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    spec = dataset_spec(file_of(tmp_path, content))
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl: no rows"):
        RowFile(spec)
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl: no rows"):
        check_first_rows(spec, None)


@pytest.mark.parametrize("where", ["nowhere.jsonl", "folder.jsonl"])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InvalidDataset, match=f"data set {where}: cannot be read"):
        RowFile(dataset_spec(tmp_path / where))
    with pytest.raises(InvalidDataset, match=f"data set {where}: cannot be read"):
        check_first_rows(dataset_spec(tmp_path / where), None)


def test_a_file_that_vanishes_meanwhile_is_refused_by_name(hundred: Path) -> None:
    rows = RowFile(dataset_spec(hundred))
    hundred.unlink()
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl"):
        rows.read([3])


def test_a_line_over_the_limit_is_refused_with_its_number(tmp_path: Path) -> None:
    frame = b'{"label": 0, "text": ""}\n'
    longest = frame.replace(b'""', b'"' + b"a" * (MAX_ROW_BYTES - len(frame)) + b'"')
    assert len(longest) == MAX_ROW_BYTES
    assert len(RowFile(dataset_spec(file_of(tmp_path, longest))).read([0])[0].text) == MAX_ROW_BYTES - len(frame)
    with pytest.raises(InvalidDataset, match=rf"line 2: longer than {MAX_ROW_BYTES} bytes"):
        RowFile(dataset_spec(file_of(tmp_path, frame + b" " + longest)))


def test_the_first_check_refuses_labels_that_the_head_does_not_have(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a", "label": label}) for label in (0, "yes", "maybe")]
    spec = dataset_spec(write_lines(tmp_path / "rows.jsonl", lines))
    with pytest.raises(InvalidDataset, match="line 3: label 'maybe' is unknown"):
        check_first_rows(spec, TWO_LABELS)
    check_first_rows(spec, None)


def test_the_first_check_ends_after_the_first_rows(tmp_path: Path) -> None:
    good = '{"text": "a", "label": 0}'
    check_first_rows(dataset_spec(write_lines(tmp_path / "late.jsonl", [good] * FIRST_ROWS + ["{oops"])), TWO_LABELS)
    spec = dataset_spec(write_lines(tmp_path / "early.jsonl", [good] * (FIRST_ROWS - 1) + ["{oops"]))
    with pytest.raises(InvalidDataset, match=f"line {FIRST_ROWS}"):
        check_first_rows(spec, TWO_LABELS)


@pytest.mark.parametrize(("texts", "is_refused"), [(["same", "same"], True), (["one", "two"], False)])
def test_rows_that_are_to_be_split_have_two_texts_at_least(tmp_path: Path, texts: list[str], is_refused: bool) -> None:
    rows = [json.dumps({"text": text, "label": number}) for number, text in enumerate(texts)]
    few, many = (write_lines(tmp_path / f"{times}.jsonl", rows * times) for times in (1, FIRST_ROWS))
    if is_refused:
        with pytest.raises(InvalidDataset, match="1 different texts, and 2 are needed"):
            check_first_rows(dataset_spec(few), TWO_LABELS, least_texts=2)
    else:
        check_first_rows(dataset_spec(few), TWO_LABELS, least_texts=2)
    check_first_rows(dataset_spec(many), TWO_LABELS, least_texts=2)  # there are rows that were not looked at


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 438002268\n", "`git lfs pull`"),
        ("/annex/objects/SHA256E-s438002268--4d7a2146.csv\n", "`git annex get`"),
        ("<!doctype html>\n<html>\n<p>text,label</p>\n", "a web page stands in its place; download the file"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet"])
def test_a_pointer_or_a_web_page_in_the_place_of_rows_is_named(
    tmp_path: Path, name: str, stand_in: str, message: str
) -> None:
    (tmp_path / name).write_text(stand_in)
    spec = dataset_spec(tmp_path / name)
    read = read_parquet if name.endswith(".parquet") else RowFile
    for reading in (lambda: check_first_rows(spec, TWO_LABELS), lambda: read(spec)):
        with pytest.raises(InvalidDataset, match=f"it is not there: .*{message}"):
            reading()
