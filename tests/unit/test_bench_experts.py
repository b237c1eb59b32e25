"""bench/experts.py: rows that were not trained on are held out, and trainings repeat."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from bench import experts
from bench.experts import Labelled, in_turn, make_task, make_tasks, prepare

WORDS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty"]


def rows(count: int, start: int = 0) -> list[Labelled]:
    """Distinct rows, one in four of them `rare`."""
    texts = (f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} {WORDS[i // 100 % 10]}" for i in range(start, start + count))
    return [Labelled(text, "rare" if i % 4 == 0 else "common") for i, text in enumerate(texts)]


def write(folder: Path, lines: list[dict[str, object]], held_out: int) -> None:
    """A task's two files."""
    folder.mkdir(parents=True)
    for part, chosen in (("train", lines[held_out:]), ("validation", lines[:held_out])):
        text = "".join(json.dumps(line) + "\n" for line in chosen)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def test_held_out_rows_are_balanced_and_never_trained_on() -> None:
    task = make_task(rows(400), None, train_rows=200, validation_rows=100, seed=0)
    assert task.labels == ["common", "rare"]
    assert Counter(row.label for row in task.validation) == {0: 50, 1: 50}
    assert Counter(row.label for row in task.train) == {0: 150, 1: 50}
    assert not {row.text for row in task.train} & {row.text for row in task.validation}


def test_a_training_row_like_a_held_out_one_is_left_out() -> None:
    validation = [row._replace(text=row.text.upper() + "!") for row in rows(40)]
    task = make_task(rows(400), validation, train_rows=1000, validation_rows=1000, seed=0)
    assert {row.text for row in task.train} == {row.text for row in rows(400)[40:]}
    assert len(task.validation) == 40


def test_pairs_count_as_one_only_where_both_texts_are_alike() -> None:
    pairs = [Labelled("the same", str(i % 2), f"another {word}") for i, word in enumerate(WORDS)]
    assert len(experts.distinct([*pairs, *pairs])) == 10


def test_copies_that_disagree_about_the_label_are_left_out() -> None:
    assert experts.distinct([Labelled("amber", "a"), Labelled("Amber.", "b"), Labelled("birch", "a")]) == [
        Labelled("birch", "a")
    ]


def test_labels_come_in_turn_until_one_runs_out() -> None:
    labels = [row.label for row in in_turn(rows(12), random.Random(0))]
    assert labels == ["common", "rare"] * 3 + ["common"] * 6


def test_a_task_without_rows_of_two_labels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "PACKAGED", {})
    write(tmp_path / "lonely", [{"text": f"{a} {b}", "label": 1} for a in WORDS for b in WORDS], 20)
    with pytest.raises(ValueError, match=r"task lonely: 80 training rows of 1 labels and 20 held-out rows are left"):
        make_tasks(tmp_path, 100, 100, 0)


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "one", "label": 0}\n{"text": "two"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: no row of text and label \(KeyError\('label'\)\)"):
        list(experts.read_folder(path))


def test_two_tasks_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "PACKAGED", {})
    lines: list[dict[str, object]] = [{"text": f"{a} {b}", "label": b > "c"} for a in WORDS for b in WORDS]
    write(tmp_path / "a" / "task", lines, 20)
    write(tmp_path / "b" / "task", lines, 20)
    with pytest.raises(ValueError, match=r"two tasks are called task; the second is .*b/task"):
        make_tasks(tmp_path, 100, 100, 0)


@pytest.mark.long
def test_training_again_gives_the_same_files_and_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "PACKAGED", {})
    data, out = tmp_path / "data", tmp_path / "out"
    lines: list[dict[str, object]] = [
        {"text": f"{a} {b}", "text_pair": "and dune", "label": b > "c"} for a in WORDS for b in WORDS
    ]
    write(data / "nested" / "pair", lines, 4)
    trained: list[str] = []

    def run() -> dict[str, bytes]:
        made = prepare(data=data, out=out, train_rows=4, epochs=1, on_expert=lambda name, _: trained.append(name))
        assert json.loads((out / "experts.json").read_text(encoding="utf-8")) == made
        assert made["pair"]["labels"] == ["false", "true"]
        files = [path for kind in ("tasks", "experts") for path in (out / kind).rglob("*") if path.is_file()]
        return {str(path.relative_to(out)): path.read_bytes() for path in files}

    first = run()
    assert trained == ["pair"]
    assert {*(f"tasks/pair/{part}.jsonl" for part in experts.PARTS), "experts/pair/model.safetensors"} < first.keys()
    assert run() == first
    assert trained == ["pair"], "what is there is not made again"

    (out / "experts" / "pair" / "config.json").unlink()
    assert run() == first
    assert trained == ["pair", "pair"]


@pytest.mark.long
def test_other_rows_and_another_seed_are_other_trainings(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"text": word, "label": word > "c"} for word in WORDS]
    write(tmp_path / "a", lines, 2)
    write(tmp_path / "b", lines, 3)
    made_from = [experts.fingerprint(tmp_path / name, 1, seed) for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert len(set(made_from)) == 3
