"""How fast mask nodes are scored, and how much that takes: always against a floor in the same run.

    python bench/scoring.py [--rows N] [--threads N ...] [--models NAME ...] [--data FILE] [--json FILE]

Floors are bare passes over the same batches, in the same number format: a forward and one backward pass to the output
of the embeddings, by the model as transformers loads it (with the faster of its two kinds of attention, found in the
same run) and by the model as it is scored here. References are the published algorithm and full-scale Fisher
information. Their times are the least of several rounds, in which all take turns.

Decoders have random weights and tokens. Their bare passes go back from the likelihoods of a row's tokens, which
transformers computes from all logits at once, and the model as scored from a few tokens' at a time.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from bench import forms
from bench.experts import PACKAGED, base_model_folder
from bench.table import shown
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import Place
from worker.engine.catalog.tasks import LabelMap
from worker.engine.inputs.examples import Batch, Example, collate, plan_batches, tokenize
from worker.engine.models.loading import LoadedModel, load
from worker.engine.runtime.device import Precision, best_device, computing_in, resolve_precision, rounded_weights
from worker.engine.scoring.batching import UNTRIED
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.gram import GramSums, in_passes
from worker.engine.scoring.scorer import mask_gradients, score, sites_of
from worker.engine.tasks import EstimatorName

ROUNDS = 3
PUBLISHED_ROWS = 64  # of the references, which are slow: their time is per row
FISHER_ROWS = 8
LABELS = (2, 3, 5, 8)
WITHIN = 1.10  # of the floor's time
OF_DECODERS = 1.15
TOGETHER = 1.4  # of the time of scores, with Gram matrices from the same passes
MEMORY = 1.45  # times what the bare pass keeps
FASTER = {"cuda": (10, 321.7), "bfloat16": (4, 40), "float32": (1.4, 15)}
"""Times that scoring is faster than the published algorithm and than full-scale Fisher information, which are both in
float32. On a CPU without matrix units so is scoring, and a bare pass is itself 16 to 21 times as fast as the latter."""
DECODERS = ("llama", "gpt2")
MODELS = ["minilm", "bert-base", *DECODERS]
LENGTHS = (16, 128)  # tokens of a decoder's rows


def checkpoint(name: str, labels: int, folder: Path) -> Path:
    """A BERT of the named size with a fresh head; speed does not depend on what the weights are."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_labels": labels, "problem_type": "single_label_classification"}
    if name == "minilm":
        model = BertForSequenceClassification.from_pretrained(base_model_folder(), **settings)
    else:
        model = BertForSequenceClassification(BertConfig(**settings))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_folder()).save_pretrained(folder)
    return folder


def texts_of(path: Path | None) -> Iterator[str]:
    """Packaged tweets, or the column `text` of JSON lines, in an order drawn from a seed."""
    if path is None:
        return (text for text, _ in PACKAGED["sentiment"]())
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    return (json.loads(line)["text"] for line in lines)


def sentences(loaded: LoadedModel, path: Path | None, count: int, tokens: int | None) -> list[Example]:
    """`count` texts; or so many in a row that each has `tokens` tokens."""
    read = texts_of(path)
    together = 1 if tokens is None else tokens // 4
    texts = [" ".join(islice(read, together)) for _ in range(count)]
    rows = [Row(Place("line", i), text, None, i % 2) for i, text in enumerate(texts)]
    spec = DatasetSpec(source="rows", label="label", max_length=tokens)
    return tokenize(rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task)).examples


# --- floors and references ----------------------------------------------------------------------------


@contextmanager
def graph_from_embeddings(loaded: LoadedModel) -> Iterator[list[Tensor]]:
    """Start the graph at the output of the embeddings; the newest is in the list."""
    roots: list[Tensor] = []

    def start(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        roots[:] = [output.detach().requires_grad_()]
        return roots[0]

    loaded.model.requires_grad_(False)
    handle = loaded.model.get_submodule(loaded.family.embeddings).register_forward_hook(start)
    try:
        yield roots
    finally:
        handle.remove()


def of_transformers(loaded: LoadedModel, batch: Batch) -> Tensor:
    """One logit of each row, or, of a language model, the loss."""
    model: Any = loaded.model
    if not loaded.family.head.merges:
        logits: Tensor = model(**batch.inputs).logits
        return logits[:, 0].sum()
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    loss: Tensor = model(**batch.inputs, labels=labels).loss
    return loss


def as_scored(loaded: LoadedModel, batch: Batch) -> Tensor:
    """The same; of a language model, from logits of a few tokens at a time."""
    if not loaded.family.head.merges:
        return of_transformers(loaded, batch)
    _, [likelihoods] = Estimator("empirical").passes(loaded, loaded.kind.run(batch.inputs), batch)
    return likelihoods.sum()


Outputs = Callable[[LoadedModel, Batch], Tensor]


def bare(
    loaded: LoadedModel, batches: Sequence[Sequence[Example]], precision: Precision, outputs: Outputs = of_transformers
) -> None:
    with graph_from_embeddings(loaded) as roots:
        for batch in collate(batches, loaded.padding, loaded.device):
            with computing_in(precision, loaded.device):
                output = outputs(loaded, batch)
            torch.autograd.grad(output, roots)


def bare_as_scored(loaded: LoadedModel, batches: Sequence[Sequence[Example]], precision: Precision) -> None:
    with rounded_weights(loaded.model, precision):
        bare(loaded, batches, precision, as_scored)


def together(
    loaded: LoadedModel,
    examples: Sequence[Example],
    estimator: Estimator,
    precision: Precision,
    batches: Sequence[Sequence[Example]],
) -> None:
    """Scores and Gram matrices from the same passes."""
    inputs, *_ = in_passes(plan_merge([loaded.info]).linear_inputs)
    with GramSums(loaded, inputs, "rows", stops=False) as sums:
        score(loaded, examples, estimator, precision, "rows", lambda _: None, batches, [sums.watching])
        sums.means()


@contextmanager
def attention(loaded: LoadedModel, kind: str) -> Iterator[None]:
    model: Any = loaded.model
    before = model.config._attn_implementation
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def multiplied_masks(loaded: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """The published code's masks, of ones, multiplied into the activations that they stand for."""
    masks: dict[str, Tensor] = {}
    handles = []
    for site in sites_of(loaded):
        [(score, nodes)] = site.counts.items()
        masks[score] = torch.ones(nodes, requires_grad=True, device=loaded.device)

        def multiply(module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor = masks[score]) -> Tensor:
            by_node = inputs[0].view(*inputs[0].shape[:2], len(mask), -1)
            return (by_node * mask[:, None]).view_as(inputs[0])

        handles.append(loaded.model.get_submodule(site.module).register_forward_pre_hook(multiply))
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def published(loaded: LoadedModel, examples: Sequence[Example]) -> None:
    """Eager attention, float32, batches of 32 in the data set's order, the gradient of each batch's mean loss."""
    totals: dict[str, Tensor] = {}
    batches = [examples[i : i + 32] for i in range(0, len(examples), 32)]
    loaded.model.requires_grad_(False)
    with attention(loaded, "eager"), multiplied_masks(loaded) as masks:
        for batch in collate(batches, loaded.padding, loaded.device):
            loss = loaded.model(**batch.inputs, labels=batch.labels).loss
            for name, g in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
                totals[name] = totals.get(name, torch.zeros_like(g)) + g**2


def full_fisher(loaded: LoadedModel, examples: Sequence[Example]) -> None:
    """Matena and Raffel: one example and one label at a time, every parameter, weighted by the label's probability."""
    loaded.model.requires_grad_(True)
    parameters = [p for n, p in loaded.model.named_parameters() if n.startswith("bert.")]
    totals = [torch.zeros_like(p) for p in parameters]
    with attention(loaded, "eager"):
        for batch in collate([[e] for e in examples], loaded.padding, loaded.device):
            log_p = loaded.model(**batch.inputs).logits.log_softmax(-1)[0]
            for y in range(len(log_p)):
                gradients = torch.autograd.grad(log_p[y], parameters, retain_graph=True)
                for total, g in zip(totals, gradients, strict=True):
                    total += log_p[y].detach().exp() * g.square()
    loaded.model.requires_grad_(False)


def row(what: str, ours: float, reference: float, most: float, target: str) -> dict[str, Any]:
    ratio = ours / reference
    return {"what": what, "ours": ours, "reference": reference, "ratio": ratio, "target": target, "met": ratio <= most}


# --- measuring ----------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds of each work, the least of `ROUNDS` in which all take turns."""

    device: torch.device

    def time(self, works: dict[str, Callable[[], None]]) -> dict[str, float]:
        best = dict.fromkeys(works, float("inf"))
        for name, work in [*works.items()] * (ROUNDS + 1):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            best[name] = min(best[name], time.perf_counter() - start)
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes of all tensors that a forward pass leaves behind for its backward pass: what autograd saved, what lives."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = {t.untyped_storage().data_ptr() for t in gc.get_objects() if issubclass(type(t), Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    for tensor in (t for t in gc.get_objects() if issubclass(type(t), Tensor)):
        note(tensor)
    del result
    return sum(size for address, size in saved.items() if address not in before)


def memory(loaded: LoadedModel, batch: Batch, precision: Precision) -> tuple[int, int]:
    """What is kept between the passes: of ours, and of the bare pass of the same model."""

    def forward() -> Tensor:
        with computing_in(precision, loaded.device):
            return loaded.kind.run(batch.inputs)

    with rounded_weights(loaded.model, precision):
        with mask_gradients(loaded):
            ours = kept_bytes(forward)
        with graph_from_embeddings(loaded):
            return ours, kept_bytes(forward)


def faster_attention(loaded: LoadedModel, batches: Sequence[Sequence[Example]], precision: Precision) -> str:
    """The kind with which the bare pass of transformers' own model is faster."""

    def work(kind: str) -> Callable[[], None]:
        def run() -> None:
            with attention(loaded, kind):
                bare(loaded, batches[:2], precision)

        return run

    seconds = Clock(loaded.device).time({kind: work(kind) for kind in ("eager", "sdpa")})
    return min(seconds, key=seconds.__getitem__)


def measure(
    name: str, precision: Precision, path: Path | None, rows: int, tokens: int | None, device: torch.device
) -> Iterator[dict[str, Any]]:
    """All rows of one model in one number format."""
    what = f"{name}, {precision}" + (f", {tokens} tokens" if tokens else "") + f", {torch.get_num_threads()} threads"
    clock = Clock(device)

    def scoring(loaded: LoadedModel, examples: Sequence[Example], estimator: EstimatorName) -> Callable[[], None]:
        asked = estimator_for(estimator, loaded.task, seed=0)

        def run() -> None:
            score(loaded, examples, asked, precision, "rows", lambda _: None, batches)

        return run

    with TemporaryDirectory() as folder:
        experts = {
            k: load(inspect_checkpoint(checkpoint(name, k, Path(folder) / str(k)), name), device)
            for k in (LABELS if tokens is None and precision == "bfloat16" else LABELS[:1])
        }
        two = experts[2]
        examples = sentences(two, path, rows, tokens)
        batches = plan_batches(examples, UNTRIED[device.type])
        stock = faster_attention(two, batches, precision)

        def stock_bare() -> None:
            with attention(two, stock):
                bare(two, batches, precision)

        works = {"stock": stock_bare, "bare": lambda: bare_as_scored(two, batches, precision)}
        works["empirical"] = scoring(two, examples, "empirical")
        for k, loaded in experts.items():
            works[f"expected {k}"] = scoring(loaded, examples, "expected")
        asked = estimator_for("expected", two.task, seed=0)
        works["together"] = lambda: together(two, examples, asked, precision, batches)
        seconds = clock.time(works)
        per_row = {work: 1000 * s / rows for work, s in seconds.items()}
        with_grams = per_row.pop("together")

        floors = {"stock": f"bare pass of transformers, {stock} attention", "bare": "bare pass as scored"}
        for reference, floor in floors.items():
            for work in [work for work in per_row if work not in floors]:
                k = int(work.removeprefix("expected ")) if work.startswith("expected") else 2
                most = (1 + 2 * (k - 1)) / 3 * WITHIN
                named = f"{what}: {work} against {floor}, ms a row"
                yield row(named, per_row[work], per_row[reference], most, f"<= {most:.2f}")

        named = f"{what}: expected 2 with Gram matrices against without, ms a row"
        yield row(named, with_grams, per_row["expected 2"], TOGETHER, f"<= {TOGETHER}")

        longest = max(batches, key=lambda batch: len(batch) * batch[-1].length)
        ours, least = memory(two, next(collate([longest], two.padding, device)), precision)
        yield row(f"{what}: kept for the backward pass, MB", ours / 1e6, least / 1e6, MEMORY, f"<= {MEMORY}")

        if tokens is None and precision == resolve_precision("auto", device):
            few, fewer = examples[:PUBLISHED_ROWS], examples[:FISHER_ROWS]
            slow = clock.time({"published": lambda: published(two, few), "full": lambda: full_fisher(two, fewer)})
            than_published, than_full = FASTER["cuda" if device.type == "cuda" else precision]
            for name_of, took, times in (
                ("the published algorithm", slow["published"] / len(few), than_published),
                ("full-scale Fisher", slow["full"] / len(fewer), than_full),
            ):
                named = f"{what}: expected 2 against {name_of}, ms a row"
                yield row(named, per_row["expected 2"], 1000 * took, 1 / times, f"<= 1/{times:g}")


def measure_decoder(name: str, precision: Precision, rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """All rows of one language model in one number format."""
    what = f"{name}, {precision}, {torch.get_num_threads()} threads"
    with TemporaryDirectory() as folder:
        loaded = load(inspect_checkpoint(forms.write(name, Path(folder)), name), device)
        examples = forms.rows(loaded, rows, LENGTHS)
        batches = plan_batches(examples, UNTRIED[device.type])
        asked = estimator_for("sampled", loaded.task, seed=0)
        stock = faster_attention(loaded, batches, precision)

        def stock_bare() -> None:
            with attention(loaded, stock):
                bare(loaded, batches, precision)

        def scores() -> None:
            score(loaded, examples, asked, precision, "rows", lambda _: None, batches)

        seconds = Clock(device).time(
            {
                "stock": stock_bare,
                "bare": lambda: bare_as_scored(loaded, batches, precision),
                "scores": scores,
                "together": lambda: together(loaded, examples, asked, precision, batches),
            }
        )
        per_row = {work: 1000 * s / rows for work, s in seconds.items()}
        for ours, reference, floor, most in (
            ("scores", "stock", f"bare pass of transformers, {stock} attention", OF_DECODERS),
            ("scores", "bare", "bare pass with logits of a few tokens at a time", OF_DECODERS),
            ("together", "scores", "scores alone", TOGETHER),
        ):
            shown_as = "with Gram matrices" if ours == "together" else "sampled"
            named = f"{what}: {shown_as} against {floor}, ms a row"
            yield row(named, per_row[ours], per_row[reference], most, f"<= {most:.2f}")
        longest = max(batches, key=lambda batch: len(batch) * batch[-1].length)
        kept, least = memory(loaded, next(collate([longest], loaded.padding, device)), precision)
        yield row(f"{what}: kept for the backward pass, MB", kept / 1e6, least / 1e6, MEMORY, f"<= {MEMORY}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=512, help="of each measurement (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on a CPU (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--data", type=Path, help="JSON lines with a column text instead of the packaged tweets")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    device = best_device()
    found: list[dict[str, Any]] = []
    for threads in options.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for name in options.models:
            best = resolve_precision("auto", device)
            for precision, tokens in dict.fromkeys([(best, None), ("float32", None), (best, 256)]):
                rows = options.rows if tokens is None else max(16, options.rows // 8)
                if name not in DECODERS:
                    works = measure(name, precision, options.data, rows, tokens, device)
                elif tokens is None:
                    works = measure_decoder(name, precision, rows, device)
                else:
                    continue
                for measured in works:
                    print(*measured.values(), flush=True)
                    found.append(measured)
    shown(options.json, found)


if __name__ == "__main__":
    main()
