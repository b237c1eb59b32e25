"""Gram matrices of every family's linear layers against a float64 pass over one example at a time."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tiny import dataset_spec, float64_model, read_rows, silent, tiny_checkpoint, write_rows
from tests.tiny_families import TINY_FAMILIES
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.methods import GRAM, NODE_FISHER
from worker.engine.catalog.methods.mask_regmean import MaskRegMeanParameters
from worker.engine.catalog.planning.plan import LinearInput
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.inputs.examples import Example, plan_batches, tokenize
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.gram import grams, in_passes
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.store import StatisticsStore

ROWS = 10
TOLERANCE = 1e-5  # in norm, float32 against float64


class Case:
    def __init__(self, name: str, root: Path) -> None:
        self.tiny = TINY_FAMILIES[name]
        self.folder = tiny_checkpoint(root / "model", family=self.tiny, labels=2)
        rows = self.rows = write_rows(root / "rows.jsonl", count=ROWS)
        info = inspect_checkpoint(self.folder, "local:model")
        self.inputs: Sequence[LinearInput] = plan_merge([info]).linear_inputs
        self.loaded: LoadedModel = load(info, torch.device("cpu"))
        self.examples: list[Example] = tokenize(
            read_rows(rows), dataset_spec(rows), self.loaded.tokenizer, self.loaded.max_length, None
        ).examples

    def measured(self, examples: Sequence[Example], inputs: Sequence[LinearInput] | None = None) -> dict[str, Tensor]:
        return grams(self.loaded, inputs or self.inputs, plan_batches(examples), "float32", "rows", silent)

    def kept(self, store: StatisticsStore, *runs: set[str]) -> tuple[dict[str, Tensor], int]:
        """The statistics that were measured in this order, and how many forward passes were begun."""
        measurer = Measurer(MaskRegMeanParameters(), self.inputs, "float32", store, BatchSizes())
        own = Sample(read_rows(self.rows), ROWS, dataset_spec(self.rows), self.loaded, None)
        found, begun = Measured(), 0

        def count(*_: object) -> None:
            nonlocal begun
            begun += 1

        handle = self.loaded.model.get_submodule(self.loaded.family.embeddings).register_forward_pre_hook(count)
        for statistics in runs:
            found = measurer.measure(found, self.loaded, "digest", own, ROWS, silent, statistics)
        handle.remove()
        assert not found.cached
        return {**found.of(GRAM), **found.of(NODE_FISHER)}, begun


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_a_gram_matrix_is_the_mean_of_outer_products_over_tokens_without_padding(case: Case) -> None:
    model = float64_model(case.folder)
    table = FAMILIES[case.tiny.model_type]
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, inputs: seen.setdefault(name, []).append(inputs[0]))

    for name, module in model.named_modules():
        slot = table.slot(f"{name}.weight")
        if isinstance(module, nn.Linear | Conv1D) and slot is not None and slot.input is not None:
            watch(name, module)
    with torch.no_grad():
        for example in case.examples:  # one at a time: there is no padding
            model(**{key: torch.tensor([ids]) for key, ids in example.encoding.items()})
    found = case.measured(case.examples)
    checked = set()
    for name, xs in seen.items():
        slot = table.slot(f"{name}.weight")
        assert slot is not None
        assert slot.input is not None
        # Some run on relative positions as well, which have as many rows whatever the example.
        step = 1 if table.shares_layers else len(xs) // ROWS
        x = torch.cat([x.flatten(0, -2) for x in xs[::step]])
        expected = x.T @ x / len(x)
        assert (found[slot.input] - expected).norm() < TOLERANCE * expected.norm(), name
        checked.add(slot.input)
    assert checked == set(found)


@pytest.fixture(scope="module", params=["bert", "albert", "gpt2", "bart"])
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family of each form: how passes are divided does not depend on a table's names."""
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_neither_order_nor_batches_nor_passes_matter(form: Case) -> None:
    whole = form.measured(form.examples)
    turned = form.measured(form.examples[::-1])
    one_by_one = [form.measured([example], form.inputs) for example in form.examples]
    tokens = torch.tensor([float(example.length) for example in form.examples], dtype=torch.float64)
    smallest = min(8 * one.width**2 for one in form.inputs)
    passes = in_passes(form.inputs, smallest)
    assert [one for group in passes for one in group] == list(form.inputs)
    assert len(passes) > 2
    in_parts = {name: gram for group in passes for name, gram in form.measured(form.examples, group).items()}
    for name, gram in whole.items():
        torch.testing.assert_close(turned[name], gram, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(in_parts[name], gram, rtol=1e-6, atol=1e-6)
        weights = torch.ones_like(tokens) if name == "pooler" else tokens
        parts = torch.stack([one[name].double() for one in one_by_one])
        mean = (parts * weights[:, None, None]).sum(0) / weights.sum()
        torch.testing.assert_close(mean, gram.double(), rtol=1e-4, atol=1e-5)


def test_with_scores_in_one_pass_both_have_the_bits_of_passes_of_their_own(form: Case, tmp_path: Path) -> None:
    with StatisticsStore(tmp_path / "one", 10**9) as one, StatisticsStore(tmp_path / "two", 10**9) as two:
        together, passes = form.kept(one, {GRAM, NODE_FISHER})
        apart, passes_apart = form.kept(two, {NODE_FISHER}, {GRAM})
        assert passes_apart == 2 * passes
        assert together.keys() == apart.keys()
        assert all(torch.equal(together[name], apart[name]) for name in apart)
    assert {entry.name for entry in (tmp_path / "one").iterdir()} == {
        entry.name for entry in (tmp_path / "two").iterdir()
    }


def test_the_model_is_left_as_it_was(form: Case) -> None:
    form.measured(form.examples[:2])
    assert not any(module._forward_pre_hooks for module in form.loaded.model.modules())
    assert len(form.loaded.model(**{k: torch.tensor([v]) for k, v in form.examples[0].encoding.items()}).logits) == 1


def test_an_overflow_is_named_with_its_row(tmp_path: Path) -> None:
    case = Case("bert", tmp_path)
    with torch.no_grad():
        table = case.loaded.model.get_submodule("bert.embeddings.word_embeddings")
        assert isinstance(table, nn.Embedding)
        table.weight[case.examples[3].encoding["input_ids"][1]] = torch.nan
    with pytest.raises(NumericalError, match=r"NaN or infinite at rows, line \d+") as caught:
        case.measured(case.examples)
    ids = case.examples[3].encoding["input_ids"][1]
    lines = {e.place.number for e in case.examples if ids in e.encoding["input_ids"]}
    assert caught.value.detail["line"] in lines
