"""Layer alignment of models that are no single stack of layers with weights of their own."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import Tensors, merge_spec, model_spec, silent, tiny_checkpoint, tiny_texts, write_lines
from tests.tiny_families import ENCODER_DECODERS, TINY_MIXTURES, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.methods import AlignedRegMeanParameters
from worker.engine.catalog.methods.featcal import FeatCalParameters
from worker.engine.catalog.methods.regmean_plus import RegMeanPlusParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import misfit, plan_merge
from worker.engine.inputs.examples import Batch, collate, plan_batches
from worker.engine.jobs.engine import Engine
from worker.engine.merging.refits import layer_alignment
from worker.engine.merging.refits.comparison import Comparison, Expert
from worker.engine.merging.refits.layer_alignment import align_layers
from worker.engine.merging.refits.linear_groups import LinearGroup, linear_groups, stacks_of
from worker.engine.models.loading import LoadedModel, load

CPU = torch.device("cpu")
ROWS = 12
WEIGHTS = (1.0, 2.5)
HOLD = 0.1
RIDGE = 1e-4
IN_ENCODER = [False, True, False, True]
"""Whether what the groups of a layer give is added to a residual."""
IN_DECODER = [False, True, False, False, True, False, True]


class Case:
    """Two language models of one ancestor, with rows beside them."""

    def __init__(self, tiny: TinyFamily, root: Path, task: str) -> None:
        self.folders = [root / name for name in ("one", "two")]
        for seed, folder in enumerate(self.folders, start=1):
            tiny_checkpoint(folder, family=tiny, seed=seed, layers=3, task=task)
            texts, targets = tiny_texts(ROWS + seed, seed, 20), tiny_texts(ROWS + seed, seed + 7, 14)
            lines = [json.dumps({"text": text, "target": target}) for text, target in zip(texts, targets, strict=True)]
            write_lines(folder.with_suffix(".jsonl"), lines)

    @property
    def plan(self) -> MergePlan:
        return plan_merge([inspect_checkpoint(folder, folder.name) for folder in self.folders])

    def loaded(self, number: int) -> LoadedModel:
        folder = self.folders[number]
        return load(inspect_checkpoint(folder, folder.name), CPU)

    def rows(self, number: int) -> DatasetSpec:
        folder = self.folders[number]
        return DatasetSpec(source=folder.name, path=folder.with_suffix(".jsonl"), target="target")

    def expert(self, model: int, rows: int) -> Expert:
        loaded, spec = self.loaded(model), self.rows(rows)
        read = sample(RowFile(spec, loaded.task.rows), spec, None, shuffle=False)
        found = loaded.kind.tokenized(read, spec, loaded.tokenizer, loaded.max_length, None)
        return Expert(loaded, WEIGHTS[rows], found.examples, spec.source)

    def experts(self) -> list[Expert]:
        return [self.expert(number, number) for number in range(2)]

    def average(self) -> nn.Module:
        """A start: both models in equal parts."""
        merged, other = (self.loaded(number).model for number in range(2))
        theirs = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.lerp_(theirs[name], 0.5)
        return merged

    def align(self, experts: Sequence[Expert], merged: nn.Module) -> Tensors:
        parameters = AlignedRegMeanParameters(hold=HOLD)
        return align_layers(self.plan, experts, merged, parameters, "float32", lambda: None)

    def merged(self, folder: Path, method: str) -> Path:
        specs = [
            model_spec(path, None, dataset=self.rows(number), weight=WEIGHTS[number])
            for number, path in enumerate(self.folders)
        ]
        Engine(CPU).merge(merge_spec(folder, specs, {"name": method}), silent)
        return folder / "model"


def share_of(expert: Expert) -> float:
    assert isinstance(expert.weight, float)
    return expert.weight / sum(WEIGHTS)


def batches_of(expert: Expert) -> list[Batch]:
    return list(collate(plan_batches(expert.examples), expert.loaded.padding, CPU))


def counted(batch: Batch, group: LinearGroup) -> Tensor:
    return batch.counted_in_decoder if group.reads_decoder else batch.counted


@contextmanager
def kept_inputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: seen[module].append(inputs[0].clone()))
        for module in seen
    ]
    yield seen
    for handle in handles:
        handle.remove()


def sampled(comparison: Any, group: LinearGroup) -> list[Tensor]:
    """What a group's layers read in the merge, and what is off of what they give, of all tokens."""
    return [torch.cat(part) for part in zip(*(sample for [sample] in comparison.samples([group])), strict=True)]


def read_in(model: nn.Module, expert: Expert, group: LinearGroup, path: str | None = None) -> Tensor:
    """What a module reads in passes of the whole model over the expert's rows, (tokens, width)."""
    module = model.get_submodule(path or group.reader)
    found = []
    for batch in batches_of(expert):
        with torch.no_grad(), kept_inputs([module]) as seen:
            model(**expert.loaded.kind.arguments(batch.inputs))
        found.append(seen[module][0].flatten(0, -2)[counted(batch, group).flatten()])
    return torch.cat(found)


def given_by(model: nn.Module, group: LinearGroup, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.get_submodule(path)(x) for path in group.modules], dim=1)


def stepped(
    model: nn.Module, experts: Sequence[Expert], group: LinearGroup, errors: Callable[[Expert, Tensor], Tensor]
) -> Tensor:
    """The ridge regression of a group by least squares, with further rows for the ridge: (outputs, inputs and bias)."""
    has_bias = getattr(model.get_submodule(group.reader), "bias", None) is not None
    rows, wanted = [], []
    for expert in experts:
        x = read_in(model, expert, group)
        e = errors(expert, x).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double() if has_bias else x.double()
        share = (share_of(expert) / len(x)) ** 0.5
        rows.append(share * x)
        wanted.append(share * e)
    energy = torch.cat(rows).square().sum(0)
    held = (HOLD * energy + RIDGE * energy.mean()).sqrt().diag()
    zeros = held.new_zeros(len(held), wanted[0].shape[1])
    found: Tensor = torch.linalg.lstsq(torch.cat([*rows, held]), torch.cat([*wanted, zeros])).solution.T
    return found


def before_the_step(merged: nn.Module, group: LinearGroup, changes: Tensors) -> None:
    """Take the changes of a group back, in place."""
    parameters = dict(merged.named_parameters())
    with torch.no_grad():
        for name in (f"{path}.{part}" for path in group.modules for part in ("weight", "bias")):
            if name in changes:
                parameters[name].sub_(changes[name])


def change_of(group: LinearGroup, changes: Tensors) -> Tensor:
    parts = []
    for path in group.modules:
        weight, bias = changes[f"{path}.weight"], changes.get(f"{path}.bias")
        parts.append(weight if bias is None else torch.cat([weight, bias[:, None]], dim=1))
    return torch.cat(parts).double()


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def text_to_text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(ENCODER_DECODERS[request.param], tmp_path_factory.mktemp(request.param), "Seq2SeqLM")


def test_layers_of_encoder_and_decoder_get_what_they_get_in_the_model(text_to_text: Case) -> None:
    """With the biases of positions of another layer, and the encoder's output."""
    expert, merged = text_to_text.expert(0, 0), text_to_text.loaded(1).model
    groups = linear_groups(text_to_text.plan)
    stacks = stacks_of(text_to_text.plan)
    comparison = Comparison(expert, merged, stacks, "float32", keeping=0)
    number = sum(map(len, stacks))
    assert [group.layer for group in groups] == [
        n for n in range(number) for _ in range(4 if n < len(stacks[0]) else 7)
    ]
    for layer in range(number):
        of_layer = [group for group in groups if group.layer == layer]
        with torch.inference_mode():
            comparison.enter(layer, of_layer)
            found = [sampled(comparison, group) for group in of_layer]
        for group, (x, e) in zip(of_layer, found, strict=True):
            torch.testing.assert_close(x, read_in(merged, expert, group), rtol=1e-5, atol=1e-5)
            if group.norm:
                theirs, ours = (read_in(model, expert, group, group.norm) for model in (expert.loaded.model, merged))
                torch.testing.assert_close(e, theirs - ours, rtol=1e-5, atol=2e-5)
        added = [bool(group.is_added) for group in of_layer]
        assert added == (
            [False, True, False, True] if len(of_layer) == 4 else [False, True, False, False, True, False, True]
        )


def test_text_to_text_is_fitted_to_what_the_merged_encoder_gives(text_to_text: Case) -> None:
    """The cross-attention's keys and values of the last layer, against least squares on passes of the whole model."""
    experts, merged = text_to_text.experts(), text_to_text.average()
    changes = text_to_text.align(experts, merged)
    group = [group for group in linear_groups(text_to_text.plan) if group.input.endswith(".encoded")][-1]
    before_the_step(merged, group, changes)

    def errors(expert: Expert, x: Tensor) -> Tensor:
        theirs = read_in(expert.loaded.model, expert, group)
        return given_by(expert.loaded.model, group, theirs) - given_by(merged, group, x)

    expected = stepped(merged, experts, group, errors)
    torch.testing.assert_close(change_of(group, changes), expected, rtol=0, atol=1e-4)
    assert float(expected.abs().max()) > 0.01


def outputs_of(model: nn.Module, expert: Expert) -> Tensor:
    """What decides the predictions of an expert's rows, by a model: logits of all tokens that count."""
    found = []
    for batch in batches_of(expert):
        with torch.no_grad():
            logits: Any = model(**expert.loaded.kind.arguments(batch.inputs)).logits
        found.append(logits[batch.counted_in_decoder])
    return torch.cat(found).double()


def errors_of(case: Case, folder: Path) -> float:
    """The mean square of what a merge's logits are off the experts', on the experts' rows, by their weights."""
    merged = load(inspect_checkpoint(folder, "merged"), CPU).model
    return sum(
        share_of(expert) * float((outputs_of(merged, expert) - outputs_of(expert.loaded.model, expert)).square().mean())
        for expert in case.experts()
    )


def check_nearer(case: Case, folder: Path) -> None:
    plain, aligned = (errors_of(case, case.merged(folder / name, name)) for name in ("regmean", "aligned_regmean"))
    assert aligned < plain


def check_same(case: Case) -> None:
    """Models that are the start leave it as it is."""
    experts = [case.expert(0, rows) for rows in range(2)]
    changes = case.align(experts, case.loaded(0).model)
    assert max(float(change.abs().max()) for change in changes.values()) < 1e-5


@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_methods_that_refit_whole_blocks_are_refused(name: str) -> None:
    family = FAMILIES[name]
    assert misfit(AlignedRegMeanParameters(), family) is None
    for method in (RegMeanPlusParameters(), FeatCalParameters()):
        assert str(misfit(method, family)).startswith(f"{method.name} fits ")


def test_text_to_text_comes_nearer_to_the_experts(text_to_text: Case, tmp_path: Path) -> None:
    check_nearer(text_to_text, tmp_path)
    check_same(text_to_text)


@pytest.fixture(scope="module", params=TINY_MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(TINY_MIXTURES[request.param], tmp_path_factory.mktemp(request.param), "CausalLM")


def routed(model: nn.Module, expert: Expert, group: LinearGroup) -> tuple[Tensor, Tensor, Tensor]:
    """What an expert reads in passes over rows: its tokens' places among all that count, these, and what all read."""
    module: Any = model.get_submodule(group.reader)
    assert group.router is not None
    router = model.get_submodule(group.router)
    places, read, everything, before = [], [], [], 0
    for batch in batches_of(expert):
        with torch.no_grad(), kept_inputs([module, router]) as seen:
            model(**expert.loaded.kind.arguments(batch.inputs))
        is_text = batch.counted.flatten()
        for place, x in zip(module.tokens.tolist(), seen[module][0], strict=True):
            if is_text[place]:
                places.append(before + int(is_text[:place].sum()))
                read.append(x)
        everything.append(seen[router][0].reshape(len(is_text), -1)[is_text])
        before += int(is_text.sum())
    width = module.weight.shape[1]
    return (
        torch.tensor(places, dtype=torch.long),
        torch.stack(read) if read else torch.empty(0, width),
        torch.cat(everything),
    )


def test_experts_are_fitted_to_what_the_same_expert_makes_of_the_same_tokens(mixture: Case) -> None:
    """Both groups of one expert of the last layer, against least squares on passes of the whole model."""
    experts, merged = mixture.experts(), mixture.average()
    changes = mixture.align(experts, merged)
    groups = [group for group in linear_groups(mixture.plan) if group.expert and group.layer == 2]
    names = [group.input.partition(".experts.")[2] for group in groups]
    count = len(names) // 2
    assert names == [f"{n}.feed_forward" for n in range(count)] + [f"{n}.neurons" for n in range(count)]
    for group in reversed([group for group in groups if group.expert == groups[1].expert]):
        before_the_step(merged, group, changes)  # what comes after it changes nothing of what it reads
        rows, wanted = [], []
        for expert in experts:
            theirs: Any = expert.loaded.model.get_submodule(group.expert or "")
            places, x, everything = routed(merged, expert, group)
            own = routed(expert.loaded.model, expert, group)[2][places]
            with torch.no_grad():
                neurons = theirs.act_fn(theirs.gate_proj(own)) * theirs.up_proj(own)
                e = given_by(expert.loaded.model, group, own if "feed_forward" in group.input else neurons)
            share = (share_of(expert) / len(everything)) ** 0.5
            assert 0 < len(places) < len(everything)
            rows.append(share * x.double())
            wanted.append(share * (e - given_by(merged, group, x)).double())
        energy = torch.cat(rows).square().sum(0)
        held = (HOLD * energy + RIDGE * energy.mean()).sqrt().diag()
        zeros = held.new_zeros(len(held), wanted[0].shape[1])
        expected = torch.linalg.lstsq(torch.cat([*rows, held]), torch.cat([*wanted, zeros])).solution.T
        torch.testing.assert_close(change_of(group, changes), expected, rtol=0, atol=1e-4)
        assert float(expected.abs().max()) > 0.01


def test_routers_are_fitted_to_the_logits_of_the_models(mixture: Case) -> None:
    experts, merged = mixture.experts(), mixture.average()
    changes = mixture.align(experts, merged)
    [group] = [group for group in linear_groups(mixture.plan) if group.input == "layers.2.feed_forward"]
    before_the_step(merged, group, changes)

    def errors(expert: Expert, x: Tensor) -> Tensor:
        theirs = read_in(expert.loaded.model, expert, group)
        weights = [model.get_parameter(f"{group.reader}.weight").detach() for model in (expert.loaded.model, merged)]
        return theirs @ weights[0].T - x @ weights[1].T

    torch.testing.assert_close(change_of(group, changes), stepped(merged, experts, group, errors), rtol=0, atol=1e-4)


def test_an_expert_without_a_token_stays_as_it_is(mixture: Case) -> None:
    experts, merged = mixture.experts(), mixture.average()
    [router] = [group for group in linear_groups(mixture.plan) if group.input == "layers.0.feed_forward"]
    for model in (merged, *(expert.loaded.model for expert in experts)):
        with torch.no_grad():
            model.get_parameter(f"{router.reader}.weight").zero_()  # of equal experts the first are chosen
    changes = mixture.align(experts, merged)
    numbers = {int(name.split(".experts.")[1].split(".")[0]) for name in changes if ".layers.0.mlp.experts." in name}
    assert 0 < len(numbers) < 4


def test_mixtures_come_nearer_to_the_experts(mixture: Case, tmp_path: Path) -> None:
    check_nearer(mixture, tmp_path)
    check_same(mixture)


def test_what_is_kept_of_a_mixture_changes_nothing(mixture: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for keeping, held in ((0, 1), (10**9, 10**9)):
        monkeypatch.setattr(layer_alignment, "most_tokens_kept", lambda hidden, keeping=keeping: keeping)
        monkeypatch.setattr(layer_alignment, "SUMS_BYTES", held)
        found.append(mixture.align(mixture.experts(), mixture.average()))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)
