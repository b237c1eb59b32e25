"""Fine-tune the experts whose merges are compared: one for each task, all from the same packaged pre-trained BERT.

Packages bring the two tasks of examples/experts.py. Every folder in DATA that holds a train.jsonl and a
validation.jsonl (rows of `text`, optional `text_pair`, `label`) brings another, named as the folder.

    python bench/experts.py OUT [--data DATA] [--train-rows N] [--validation-rows N] [--epochs N] [--seed S]

Writes OUT/tasks/NAME/{train,validation}.jsonl, OUT/experts/NAME and OUT/experts.json, which has the labels, rows and
validation accuracy of each. An expert that is there is not trained again unless its rows or the recipe changed.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

# Before this folder, whose file of experts is this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import experts as demo
from experts import Row, base_model_folder

__all__ = ["Row", "base_model_folder", "make_tasks", "prepare"]

PACKAGED = demo.READERS
RECIPE = 1  # raise it when the same rows would give other weights
BATCH_ROWS = 32
PROCESSES = 2  # at once; each takes as many threads as one of the demo's two
PARTS = ("train", "validation")


class Labelled(NamedTuple):
    """A row whose label still has its name."""

    text: str
    label: str
    text_pair: str = ""


class Task(NamedTuple):
    """The rows of a task, and the labels' names in the order of their ids."""

    labels: list[str]
    train: list[Row]
    validation: list[Row]


# --- data ---------------------------------------------------------------------------------------------


def read_folder(path: Path) -> Iterator[Labelled]:
    """The rows of a file of JSON lines; a label's name is its JSON, of text the text itself.

    Raises:
        ValueError: a line is no such row.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                text, pair, label = row["text"], row.get("text_pair") or "", row["label"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: no row of text and label ({error!r})") from error
            yield Labelled(text, label if isinstance(label, str) else json.dumps(label), pair)


def likeness(row: Labelled) -> str:
    """The same for rows that count as one."""
    return demo.likeness(row.text) + "|" + demo.likeness(row.text_pair)


def distinct(rows: Iterable[Labelled], known: Iterable[Labelled] = ()) -> list[Labelled]:
    """One row of each likeness; none where the copies disagree about the label, or that is like a known one."""
    alike: dict[str, list[Labelled]] = defaultdict(list)
    for row in rows:
        alike[likeness(row)].append(row)
    taken = {likeness(row) for row in known} | {"|"}  # "|" is that of rows without a letter
    return [
        copies[0] for key, copies in alike.items() if key not in taken and len({copy.label for copy in copies}) == 1
    ]


def in_turn(rows: Iterable[Labelled], rng: random.Random) -> list[Labelled]:
    """The rows in random order, the labels taken in turn: every beginning of it is as balanced as can be."""
    by_label: dict[str, list[Labelled]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    columns = [rng.sample(same, len(same)) for _, same in sorted(by_label.items())]
    return [row for turn in zip_longest(*columns) for row in turn if row is not None]


def make_task(
    train: Iterable[Labelled], validation: Iterable[Labelled] | None, train_rows: int, validation_rows: int, seed: int
) -> Task:
    """Make a task of at most so many rows to train on and to hold out, both balanced over labels as far as rows go.

    Without `validation` a quarter of the rows at most is held out.

    Raises:
        ValueError: rows of fewer than two labels are left, or none to hold out.
    """
    rng = random.Random(seed)
    if validation is None:
        rows = in_turn(distinct(train), rng)
        count = min(validation_rows, len(rows) // 4)
        held_out, rest = rows[:count], rows[count:]
    else:
        held_out = in_turn(distinct(validation), rng)[:validation_rows]
        rest = in_turn(distinct(train, held_out), rng)
    rest = rest[:train_rows]
    rng.shuffle(rest)
    labels = sorted({row.label for row in rest})
    ids = {label: index for index, label in enumerate(labels)}
    if len(ids) < 2 or not held_out:
        raise ValueError(f"{len(rest)} training rows of {len(ids)} labels and {len(held_out)} held-out rows are left")
    if unknown := {row.label for row in held_out} - ids.keys():
        raise ValueError(f"labels of held-out rows alone: {', '.join(sorted(unknown))}")
    return Task(labels, *([Row(row.text, ids[row.label], row.text_pair) for row in part] for part in (rest, held_out)))


def make_tasks(data: Path | None, train_rows: int, validation_rows: int, seed: int) -> dict[str, Task]:
    """All tasks, by name.

    Raises:
        ValueError: two tasks have one name, or a task has not the rows it needs.
    """
    sources: dict[str, tuple[Iterable[Labelled], Iterable[Labelled] | None]] = {
        name: ((Labelled(*row) for row in read()), None) for name, read in PACKAGED.items()
    }
    for path in sorted(data.rglob("train.jsonl") if data else ()):
        if (path.parent / "validation.jsonl").is_file():
            name = path.parent.name
            if name in sources:
                raise ValueError(f"two tasks are called {name}; the second is {path.parent}")
            sources[name] = read_folder(path), read_folder(path.parent / "validation.jsonl")
    tasks = {}
    for name, (train, validation) in sources.items():
        try:
            tasks[name] = make_task(train, validation, train_rows, validation_rows, seed)
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from error
    return tasks


# --- training -----------------------------------------------------------------------------------------


def train(name: str, labels: list[str], build: Path, seed: int, epochs: int) -> float:
    """Make one expert in the build folder, in a process of its own; its validation accuracy."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # else it tells of each training that the new head is not pre-trained
    logging.disable_progress_bar()
    told: dict[str, float] = {}
    demo.train_expert(
        name, labels, build, seed, lambda kind, *values: told.update({kind: values[0]}), epochs, BATCH_ROWS
    )
    return told["accuracy"]


def prepare(
    out: Path,
    data: Path | None = None,
    *,
    train_rows: int = 6000,
    validation_rows: int = 800,
    epochs: int = 3,
    seed: int = 0,
    on_expert: Callable[[str, dict[str, Any]], None] = lambda name, made: None,
) -> dict[str, dict[str, Any]]:
    """Write all tasks and experts to `out` unless they are there; what experts.json says of them.

    What an interrupted run finished is kept, and the next run goes on from there. `on_expert` is called with each
    expert's name and what is known of it.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    tasks = make_tasks(data, train_rows, validation_rows, seed)
    with demo.alone(out):
        for left_over in out.glob(f"{demo.BUILD_PREFIX}*/"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=demo.BUILD_PREFIX, dir=out, ignore_cleanup_errors=True) as folder:
            build = Path(folder)
            wanted: dict[str, dict[str, Any]] = {}
            for name, task in tasks.items():
                (build / "tasks" / name).mkdir(parents=True)
                for part in PARTS:
                    demo.write_rows(build / "tasks" / name / f"{part}.jsonl", getattr(task, part))
                wanted[name] = {
                    "labels": task.labels,
                    "rows": {part: len(getattr(task, part)) for part in PARTS},
                    "made_from": fingerprint(build / "tasks" / name, epochs, seed),
                }
            experts = {name: made for name, made in recorded(out).items() if is_ready(out, name, made, wanted)}
            record(out, experts)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(PROCESSES, mp_context=context, max_tasks_per_child=1) as pool:
                futures = {
                    pool.submit(train, name, tasks[name].labels, build, seed, epochs): name
                    for name in wanted
                    if name not in experts
                }
                for future in as_completed(futures):
                    name, accuracy = futures[future], round(future.result(), 4)
                    publish(build, out, name)
                    experts[name] = {**wanted[name], "validation_accuracy": accuracy}
                    record(out, experts)
                    on_expert(name, experts[name])
    return {name: experts[name] for name in tasks}


def fingerprint(task: Path, epochs: int, seed: int) -> str:
    """The same for trainings that give the same files."""
    digest = hashlib.sha256(json.dumps([RECIPE, demo.RECIPE, epochs, seed]).encode())
    for part in PARTS:
        digest.update((task / f"{part}.jsonl").read_bytes())
    return digest.hexdigest()


def recorded(out: Path) -> dict[str, dict[str, Any]]:
    """The experts that earlier runs finished."""
    try:
        return dict(json.loads((out / demo.STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def record(out: Path, experts: dict[str, dict[str, Any]]) -> None:
    """Say which experts are finished; what the file names is in place."""
    new = out / f".{demo.STAMP}"
    new.write_text(json.dumps(dict(sorted(experts.items())), indent=2) + "\n", encoding="utf-8")
    new.replace(out / demo.STAMP)


def is_ready(out: Path, name: str, made: dict[str, Any], wanted: dict[str, dict[str, Any]]) -> bool:
    """Whether an earlier run made just this expert, and its files are there; one that nobody wants stays ready."""
    files = [out / "experts" / name / file for file in demo.CHECKPOINT_FILES]
    files += [out / "tasks" / name / f"{part}.jsonl" for part in PARTS]
    return made["made_from"] == wanted.get(name, made)["made_from"] and all(path.is_file() for path in files)


def publish(build: Path, out: Path, name: str) -> None:
    """Move an expert and its rows into place."""
    for kind in ("tasks", "experts"):
        target = out / kind / name
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (build / kind / name).rename(target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune one small BERT expert for each task.")
    parser.add_argument("out", type=Path, help="folder for the tasks and the experts")
    parser.add_argument("--data", type=Path, help="folder that is searched for more tasks")
    parser.add_argument("--train-rows", type=int, default=6000, help="training rows of a task, at most (%(default)s)")
    parser.add_argument("--validation-rows", type=int, default=800, help="held-out rows, at most (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows and of the training (%(default)s)")
    options = parser.parse_args()

    def show(name: str, made: dict[str, Any]) -> None:
        rows = made["rows"]
        print(
            f"{name}: {len(made['labels'])} labels, {rows['train']} training rows, validation accuracy "
            f"{made['validation_accuracy']:.3f} on {rows['validation']} rows",
            flush=True,
        )

    made = prepare(
        options.out,
        options.data,
        train_rows=options.train_rows,
        validation_rows=options.validation_rows,
        epochs=options.epochs,
        seed=options.seed,
        on_expert=show,
    )
    print(f"{len(made)} experts in {options.out / 'experts'}")


if __name__ == "__main__":
    main()
