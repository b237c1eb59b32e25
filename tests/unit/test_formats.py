"""CSV and Parquet: the same rows as from JSON lines, and every way in which they are refused by their place."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.tiny import dataset_spec
from worker.engine.catalog.data.formats import MAX_ROW_BYTES
from worker.engine.catalog.data.rows import FIRST_ROWS, RowFile, Rows, check_first_rows, is_parquet, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.tasks import Classification, LabelMap, MultiLabel
from worker.engine.inputs.tables import TableRows, read_parquet

TWO_LABELS = LabelMap(Classification(2, {"no": 0, "yes": 1}))
TEXTS = [
    "plain",
    'a "quoted", text',
    "two\nlines",
    "žluť 猫 🙂",
    "",
    "NA",
    " padded ",
    "carriage\r\nreturn",
    "trailing\\",
]
LINES = [text for text in TEXTS if "\n" not in text and "\t" not in text]
"""What a file between tabs can hold."""
ROWS = [{"text": text, "second": f"{index}", "label": index % 2} for index, text in enumerate(TEXTS)]


def written(folder: Path, suffix: str, *, rows: list[dict[str, Any]] = ROWS, mark: bytes = b"") -> Path:
    file = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="", encoding="utf-8") as stream:
            if suffix == ".tsv":
                stream.writelines(
                    "\t".join(map(str, line)) + "\n" for line in (rows[0], *(row.values() for row in rows))
                )
            else:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        file.write_bytes(mark + file.read_bytes())
    return file


def rows_of(spec: DatasetSpec) -> Rows:
    return read_parquet(spec) if is_parquet(spec) else RowFile(spec)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "byte order mark"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".CSV"])
def test_every_format_gives_the_rows_of_json_lines_in_the_same_order(tmp_path: Path, suffix: str, mark: bytes) -> None:
    columns = {"text_pair": "second", "seed": 3}
    rows = [row for row in ROWS if suffix != ".tsv" or row["text"] in LINES]
    plain = dataset_spec(written(tmp_path, ".jsonl", rows=rows), **columns)
    spec = dataset_spec(written(tmp_path, suffix, rows=rows, mark=mark), **columns)
    expected, found = sample(RowFile(plain), plain, None), sample(rows_of(spec), spec, None)
    assert [(row.text, row.text_pair) for row in found] == [(row.text, row.text_pair) for row in expected]
    labels = [TWO_LABELS.value(row.label, "rows", row.place) for row in found]
    assert labels == [row.label for row in expected]
    check_first_rows(spec, TWO_LABELS)


def test_a_row_of_csv_is_placed_at_the_line_where_it_begins(tmp_path: Path) -> None:
    content = 'text,label\none,0\n"two\nand\nthree",1\n\nfour,0\n"five\n",1\n'
    file = tmp_path / "rows.csv"
    file.write_text(content)
    rows = RowFile(dataset_spec(file)).read([3, 2, 1, 0])
    assert [str(row.place) for row in rows] == ["line 8", "line 7", "line 3", "line 2"]
    assert [row.text for row in rows] == ["five\n", "four", "two\nand\nthree", "one"]
    file.write_bytes(content.replace("\n", "\r\n").encode())
    assert [row.text for row in RowFile(dataset_spec(file)).read([1, 2])] == ["two\r\nand\r\nthree", "four"]


BAD_CSV: dict[str, tuple[bytes, dict[str, Any], list[str]]] = {
    "too few fields": (b"text,label\none,0\ntwo\n", {}, ["line 3", "1 fields, the header has 2"]),
    "too many fields": (b"text,label\none,0\ntwo, and three,1\n", {}, ["line 3", "3 fields, the header has 2"]),
    "an open quote": (b'text,label\none,0\n"two,1\n', {}, ["line 3", "not CSV"]),
    "a quote that ends before its field": (
        b'text,label\n"one" two,0\n',
        {},
        ["line 2", "quote the whole field, or double the quote in it"],
    ),
    "text after a quote": (b'text,label\none,0\n"two"x,1\n', {}, ["line 3", "not CSV", "double the quote"]),
    "not UTF-8": ("text,label\none,0\né,1\n".encode("latin-1"), {}, ["line 3", "not UTF-8"]),
    "no such column": (b"sentence,label\none,0\n", {}, ["line 2", "no column 'text'", "label, sentence"]),
    "a column twice": (b"text,label,text\none,0,two\n", {}, ["line 1", "'text' twice"]),
    "another delimiter": (b"text;label\none;0\n", {}, ["line 2", "no column 'text'", "text;label"]),
    "an unknown label": (b"text,label\none,0\ntwo,maybe\n", {}, ["line 3", "label 'maybe' is unknown"]),
    "no label": (b"text,label\none,0\ntwo,\n", {}, ["line 3", "label '' is unknown"]),
    "only a header": (b"text,label\n", {}, ["rows.csv: no rows"]),
    "nothing": (b"", {}, ["rows.csv: no rows"]),
    "a field that never ends": (
        b'text,label\n"' + b"x\n" * MAX_ROW_BYTES,
        {},
        ["line 2", "longer than 10000000 bytes"],
    ),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_refused_with_its_line_at_the_door_and_in_the_work(tmp_path: Path, case: str) -> None:
    content, columns, words = BAD_CSV[case]
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    spec = dataset_spec(file, **columns)

    def read_all() -> None:
        rows = RowFile(spec)
        for row in rows.read(range(len(rows))):
            TWO_LABELS.value(row.label, spec.source, row.place)

    for read in (read_all, lambda: check_first_rows(spec, TWO_LABELS)):
        with pytest.raises(InvalidDataset) as caught:
            read()
        assert not [word for word in words if word not in caught.value.message], caught.value.message


def test_the_first_check_of_csv_ends_after_the_first_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "one,0\n" * FIRST_ROWS + "broken\n")
    check_first_rows(dataset_spec(file), TWO_LABELS)
    rows = RowFile(dataset_spec(file))
    with pytest.raises(InvalidDataset, match=f"line {FIRST_ROWS + 2}"):
        rows.read([FIRST_ROWS])


@pytest.mark.parametrize("text", ['"', '"open', 'shut"', '"both"', 'a "b" c', "'", '""', '" , "', "\\"])
def test_between_tabs_a_quote_is_a_character(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text(f"text\tlabel\n{text}\t0\nnext\t1\n{text}\t1\n")
    rows = RowFile(dataset_spec(file))
    assert [(row.text, row.label) for row in rows.read(range(len(rows)))] == [(text, "0"), ("next", "1"), (text, "1")]
    assert rows.notes == []
    check_first_rows(dataset_spec(file), TWO_LABELS)


NOTED: dict[str, tuple[str, str, int, list[str], bool]] = {
    "rows joined by quotes": (
        ".csv", 'text,label\n"a\nb",0\n"c\nd\ne",1\nf,0\n', 3, ["2 rows", "5 lines, which quotes join"], False,
    ),
    "rows joined by a quote that is not closed": (
        ".csv", 'text,label\n"hello,0\nworld",1\nf,0\n', 2, ["1 rows", "2 lines", "rows of their own"], True,
    ),
    "rows joined by a quote that is not closed, with commas": (
        ".csv", 'text,label\n"hello, you,0\nworld",1\nf,0\n', 2, ["1 rows", "2 lines", "rows of their own"], True,
    ),
    "rows joined by a quote that is not closed, with the label first": (
        ".csv", 'label,text\n0,"hello, you\n1,world"\n0,f\n', 2, ["1 rows", "2 lines", "rows of their own"], True,
    ),
    "a letter with commas": (
        ".csv", 'text,label\n"dear all, so be it,\nas you, or we, like it",1\nf,0\n', 2, ["1 rows", "2 lines"], False,
    ),
    "blank lines in CSV": (".csv", "text,label\n\na,0\n\n\nb,1\n\n\n", 2, ["3 blank lines between"], False),
    "blank lines between tabs": (".tsv", "text\tlabel\na\t0\n\nb\t1\n", 2, ["1 blank lines between"], False),
    "blank lines in JSON lines": (
        ".jsonl", '{"text": "a", "label": 0}\n \n\n{"text": "b", "label": 1}\n\n', 2, ["2 blank lines between"], False,
    ),
    "fields between tabs that are quoted": (
        ".tsv", 'text\tlabel\n"he said ""no"""\t0\n"a ""b"" c\t1\n', 2, ["1 fields", "look quoted"], True,
    ),
    "columns between tabs that are quoted": (
        ".tsv", 'text\tlabel\n"one"\t"0"\n"two"\t"1"\n"three"\t"1"\n', 3,
        ["3 of 3 fields", "look quoted as in CSV in column 'text', 'label'"], True,
    ),
    "a column between tabs whose texts are quoted where there is one": (
        ".tsv", 'text\tlabel\n' + 9 * '"two ""2"" "\t1\n' + "\t1\n", 10,
        ["9 of 10 fields", "look quoted as in CSV in column 'text';"], True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTED)
def test_what_joins_or_passes_over_lines_is_counted_and_said(tmp_path: Path, case: str) -> None:
    suffix, content, count, words, is_doubt = NOTED[case]
    file = tmp_path / f"rows{suffix}"
    file.write_text(content)
    rows = RowFile(dataset_spec(file))
    assert len(rows) == len(rows.read(range(count))) == count
    [note] = rows.notes
    assert not [word for word in (f"rows{suffix}", *words) if word not in note], note
    assert isinstance(note, Doubt) == is_doubt


def test_some_sentences_in_quotes_are_no_quoted_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text('text\tlabel\n"No."\t0\n"Yes."\t1\nhe said\t0\n"she" said\t1\n')
    rows = RowFile(dataset_spec(file))
    assert [row.text for row in rows.read(range(4))] == ['"No."', '"Yes."', "he said", '"she" said']
    assert rows.notes == []


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b"text|label\rone|0\rtwo|1\r", ["line 1", "carriage return"]),
        (b"text|label\none\0|0\n", ["line 2", "zero byte"]),
        ("text|label\none|0\n".encode("utf-16"), ["line 1", "not UTF-8"]),
        ("text|label\none|0\n".encode("utf-16-le"), ["line 1", "zero byte"]),
        (b"text|label\none|0\ntw", ["line 3", "1 fields, the header has 2"]),
        (b"gj04|1||they drank\ngj04|1||it rained\n", ["no column 'text'", "known are"]),
    ],
    ids=["CR alone", "zero byte", "UTF-16", "UTF-16 without mark", "cut off", "no header"],
)
def test_text_that_is_not_whole_lines_is_refused(tmp_path: Path, suffix: str, lines: bytes, words: list[str]) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(lines.replace(b"|", b"," if suffix == ".csv" else b"\t"))

    def read_all() -> None:
        rows = RowFile(dataset_spec(file))
        rows.read(range(len(rows)))

    for read in (read_all, lambda: check_first_rows(dataset_spec(file), TWO_LABELS)):
        with pytest.raises(InvalidDataset) as caught:
            read()
        assert not [word for word in words if word not in caught.value.message], caught.value.message


def test_a_limit_counts_rows_not_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f'"row\n{number}",0\n\n' for number in range(20)))
    spec = dataset_spec(file, limit=7)
    found = sample(RowFile(spec), spec, None)
    assert len({row.text for row in found}) == 7
    assert {row.place.number % 3 for row in found} == {2}


def test_a_key_that_a_line_has_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one", "label": 0, "label": 1}\n')
    with pytest.raises(InvalidDataset, match=r"line 1: not a JSON object \(the key 'label' twice\)"):
        check_first_rows(dataset_spec(file), TWO_LABELS)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.txt", "rows"])
def test_a_format_that_the_name_does_not_tell_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "one", "label": 0}\n')
    spec = dataset_spec(tmp_path / name)
    for read in (lambda: RowFile(spec), lambda: check_first_rows(spec, None)):
        with pytest.raises(InvalidDataset, match=r"\.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet"):
            read()


def parquet(folder: Path, **columns: list[Any]) -> DatasetSpec:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    return dataset_spec(folder / "rows.parquet")


def test_rows_of_parquet_are_read_in_any_order_and_counted_from_one(tmp_path: Path) -> None:
    spec = parquet(tmp_path, text=["one", "two", "three"], label=[0, 1, 0], other=[b"x", b"y", b"z"])
    rows = rows_of(spec).read([2, 0, 2])
    assert [(row.place, row.text, row.label) for row in rows] == [
        (Place("row", 3), "three", 0),
        (Place("row", 1), "one", 0),
        (Place("row", 3), "three", 0),
    ]


def test_label_names_of_a_parquet_file_are_known(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    datasets.Dataset.from_dict({"text": ["one"], "label": [1]}, features).to_parquet(tmp_path / "rows.parquet")
    assert rows_of(dataset_spec(tmp_path / "rows.parquet")).label_names == ("yes", "no")
    assert rows_of(dataset_spec(tmp_path / "rows.parquet", label=None)).label_names is None


LISTS = {
    "a list": pyarrow.array([[0, 2], []], pyarrow.list_(pyarrow.int64())),
    "a large list": pyarrow.array([[0, 2], []], pyarrow.large_list(pyarrow.int32())),
    "truth values, always three": pyarrow.array([[True, False, True], [False] * 3], pyarrow.list_(pyarrow.bool_(), 3)),
    "floats": pyarrow.array([[1.0, 0.0, 1.0], [0.0] * 3]),
    "integers for each": pyarrow.array([[1, 0, 1], [0] * 3], pyarrow.list_(pyarrow.int8())),
    "names": pyarrow.array([["insult", "praise"], []], pyarrow.list_(pyarrow.string())),
    "names as views": pyarrow.array([["insult", "praise"], []], pyarrow.list_(pyarrow.string_view())),
    "large names": pyarrow.array([["insult", "praise"], []], pyarrow.list_(pyarrow.large_string())),
    "a view of a list": pyarrow.array([[0, 2], []], pyarrow.list_view(pyarrow.int64())),
    "names of a dictionary": pyarrow.array(
        [["insult", "praise"], []], pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    ),
}  # fmt: skip
THREE_LABELS = LabelMap(MultiLabel(3, {"insult": 0, "threat": 1, "praise": 2}))


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_labels_are_read_from_parquet(tmp_path: Path, case: str) -> None:
    rows = rows_of(parquet(tmp_path, text=["one", "two"], label=LISTS[case])).read([0, 1])
    values = [THREE_LABELS.value(row.label, "rows", row.place) for row in rows]
    assert values == [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0)]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()], ids=str)
def test_text_of_every_type_is_read_from_parquet(tmp_path: Path, kind: Any) -> None:
    text, label = pyarrow.array(["b", "a", "b"], kind), pyarrow.array(["yes", "no", "yes"], kind)
    rows = rows_of(parquet(tmp_path, text=text, label=label)).read([2, 1])
    assert [(row.text, TWO_LABELS.value(row.label, "rows", row.place)) for row in rows] == [("b", 1), ("a", 0)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["text", "text_pair"])
def test_a_zero_byte_is_no_text_in_any_format(tmp_path: Path, suffix: str, column: str) -> None:
    rows = [{"text": "a", "text_pair": "b", "label": 0}, {"text": "c", "text_pair": "d", "label": 1, column: "e\0"}]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidDataset, match=rf"(line|row) 2: column '{column}' has a zero byte"):
        rows_of(dataset_spec(file, text_pair="text_pair")).read([0, 1])


def test_columns_of_a_dictionary_are_read_from_parquet(tmp_path: Path) -> None:
    text, label = (pyarrow.array(values).dictionary_encode() for values in (["b", "a", "b"], ["yes", "no", "yes"]))
    rows = rows_of(parquet(tmp_path, text=text, label=label)).read([2, 1])
    assert [(row.text, TWO_LABELS.value(row.label, "rows", row.place)) for row in rows] == [("b", 1), ("a", 0)]


@pytest.mark.parametrize("feature", [datasets.List, datasets.LargeList])
def test_names_of_listed_labels_are_known(tmp_path: Path, feature: Any) -> None:
    labels = feature(datasets.ClassLabel(names=["praise", "insult"]))
    table = datasets.Dataset.from_dict(
        {"text": ["one"], "label": [[1]]}, datasets.Features({"text": datasets.Value("string"), "label": labels})
    )
    table.to_parquet(tmp_path / "rows.parquet")
    spec = dataset_spec(tmp_path / "rows.parquet")
    for rows in (rows_of(spec), TableRows(table, spec)):
        assert rows.label_names == ("praise", "insult")
        assert rows.read([0])[0].label == [1]


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": {"names": ["no", "yes"], "_type": "ClassLabel"}, "length": -1, "_type": "Sequence"},
        [{"names": ["no", "yes"], "_type": "ClassLabel"}],
        {"names": ["no", "yes"], "_type": "ClassLabel"},
    ],
    ids=["sequence", "list", "one"],
)
def test_label_names_are_known_as_older_versions_wrote_them(tmp_path: Path, feature: Any) -> None:
    about = json.dumps({"info": {"features": {"label": feature}}})
    table = pyarrow.table({"text": ["one"], "label": [1]}).replace_schema_metadata({"huggingface": about})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(dataset_spec(tmp_path / "rows.parquet")).label_names == ("no", "yes")


@pytest.mark.parametrize(
    "metadata",
    ["not JSON", "[]", "5", '{"info": 5}', '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 5}}}}',
     '{"info": {"features": {"text": {"_type": "Image"}, "label": {"_type": "Odd"}}}}'],
)  # fmt: skip
def test_whatever_another_program_wrote_beside_the_columns_the_rows_are_read(tmp_path: Path, metadata: str) -> None:
    table = pyarrow.table({"text": ["one"], "label": [1]}).replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = rows_of(dataset_spec(tmp_path / "rows.parquet"))
    assert rows.label_names is None
    assert [(row.text, row.label) for row in rows.read([0])] == [("one", 1)]


def test_columns_that_hold_no_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="column 'text' holds"):
        rows_of(parquet(tmp_path, text=[["one"]], label=[0]))
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InvalidDataset, match="column 'text' is there twice"):
        rows_of(dataset_spec(tmp_path / "rows.parquet", label=None))
    entries = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    with pytest.raises(InvalidDataset, match=r"rows\.parquet"):
        rows_of(parquet(tmp_path, text=["one"], label=entries)).read([0])
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"\xff\xfe")]
    )
    with pytest.raises(InvalidDataset, match=r"rows\.parquet"):
        rows_of(parquet(tmp_path, text=broken, label=[0])).read([0])


def test_what_spreadsheets_leave_behind_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("\n\ntext,label,,\none,0.0,,\ntwo,1.0,,\n,,,\n")
    rows = RowFile(dataset_spec(file)).read([0, 1])
    assert [(row.text, TWO_LABELS.value(row.label, "rows", row.place)) for row in rows] == [("one", 0), ("two", 1)]


def test_the_first_row_of_a_file_without_a_header_is_not_told_in_full(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a long and private text that nobody but its owner should ever read, " * 50 + "1\none\n")
    with pytest.raises(InvalidDataset) as caught:
        check_first_rows(dataset_spec(file), None)
    assert len(caught.value.message) < 1500


def test_bad_parquet_is_refused_by_its_row_and_column(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match=r"no column 'text'; did you mean 'txt'\?"):
        rows_of(parquet(tmp_path, txt=["one"], label=[0]))
    with pytest.raises(InvalidDataset, match="no rows"):
        rows_of(parquet(tmp_path, text=[], label=[]))
    with pytest.raises(InvalidDataset, match="row 2: column 'text' is not text"):
        rows_of(parquet(tmp_path, text=["one", None], label=[0, 1])).read([0, 1])
    spec = parquet(tmp_path, text=["one" * 1000], label=[0])
    check_first_rows(spec, TWO_LABELS)
    assert spec.path is not None
    spec.path.write_bytes(spec.path.read_bytes()[:100])
    with pytest.raises(InvalidDataset, match="not a readable table"):
        rows_of(spec)
    spec.path.write_bytes(b"text,label\n")
    with pytest.raises(InvalidDataset, match="not a Parquet file"):
        check_first_rows(spec, TWO_LABELS)
