"""Layer alignment: against the same sequence of fits computed another way, and what it does in every family."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.tiny import (
    HEADS,
    Tensors,
    dataset_spec,
    float64_model,
    merge_spec,
    model_spec,
    read_model,
    read_rows,
    silent,
    tiny_base,
    tiny_checkpoint,
    write_rows,
)
from tests.tiny_families import TINY_FAMILIES
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import OutputSpec
from worker.engine.catalog.families import Kind
from worker.engine.catalog.families.table import Norms
from worker.engine.catalog.methods import AlignedRegMeanParameters, AutoParameters, RegMeanParameters
from worker.engine.catalog.methods.regmean_plus import RegMeanPlusParameters
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.planning.planner import plan_job, plan_merge
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, NumericalError
from worker.engine.catalog.primitives.values import PerTensor
from worker.engine.inputs.examples import collate, plan_batches, tokenize
from worker.engine.jobs.engine import Engine
from worker.engine.merging.refits import layer_alignment, regression
from worker.engine.merging.refits.comparison import Comparison, Expert
from worker.engine.merging.refits.layer_alignment import align_layers
from worker.engine.merging.refits.linear_groups import linear_groups, stacks_of
from worker.engine.merging.refits.regression import ridge_step
from worker.engine.models.loading import LoadedModel, load

LAYERS = 3  # of which the first two are reached in another way than the rest
ROWS = 25
LABELS = {"two": 2, "three": 3}
WEIGHTS = (1.0, 2.5)
HOLD = 0.1
RIDGE = 1e-4
NORMS = (Kind.ATTENTION_NORM, Kind.FEED_FORWARD_NORM)
NO_MATRICES = (*NORMS, Kind.QUERY_NORM, Kind.KEY_NORM, Kind.POSITION)
CPU = torch.device("cpu")


class Case:
    """Two experts of one ancestor, of three layers each, and their rows."""

    def __init__(self, name: str, root: Path) -> None:
        self.tiny = TINY_FAMILIES[name]
        self.folders = [root / expert for expert in LABELS]
        self.base = tiny_base(root / "base", family=self.tiny, layers=LAYERS)
        for seed, (folder, labels) in enumerate(zip(self.folders, LABELS.values(), strict=True)):
            tiny_checkpoint(folder, family=self.tiny, labels=labels, seed=seed, layers=LAYERS)
            write_rows(folder.with_suffix(".jsonl"), count=ROWS + 5 * seed, labels=labels, seed=seed)

    @property
    def plan(self) -> MergePlan:
        return plan_merge([inspect_checkpoint(folder, folder.name) for folder in self.folders])

    @property
    def norms(self) -> Norms:
        return required_family(self.plan).norms_in(self.plan.checkpoints[0].config)

    def loaded(self, folder: Path) -> LoadedModel:
        return load(inspect_checkpoint(folder, folder.name), CPU)

    def experts(self) -> list[Expert]:
        return [
            self.expert(folder, folder.with_suffix(".jsonl"), weight)
            for folder, weight in zip(self.folders, WEIGHTS, strict=True)
        ]

    def expert(self, folder: Path, rows: Path, weight: float) -> Expert:
        loaded, spec = self.loaded(folder), dataset_spec(rows)
        found = tokenize(read_rows(rows), spec, loaded.tokenizer, loaded.max_length, None)
        return Expert(loaded, weight, found.examples, rows.name)

    def average(self) -> nn.Module:
        """A start: the experts' backbones in equal parts."""
        merged, other = (self.loaded(folder).model for folder in self.folders)
        theirs = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                if not name.startswith(self.tiny.head):
                    parameter.lerp_(theirs[name], 0.5)
        return merged

    def align(self, experts: Sequence[Expert], merged: nn.Module, hold: PerTensor[float] = HOLD) -> Tensors:
        return align_layers(self.plan, experts, merged, AlignedRegMeanParameters(hold=hold), "float32", lambda: None)

    def merge(self, folder: Path, *, base: bool = False, **method: Any) -> list[Path]:
        """The merged models' folders."""
        models = [
            model_spec(path, path.with_suffix(".jsonl"), weight=weight)
            for path, weight in zip(self.folders, WEIGHTS, strict=True)
        ]
        spec = merge_spec(folder, models, method)
        if base:
            spec = type(spec).model_validate({**spec.model_dump(), "base": {"source": "local:base", "path": self.base}})
        Engine(CPU).merge(spec, silent)
        return [folder / "models" / path.name for path in self.folders]


@pytest.fixture(
    scope="module", params=[n for n, tiny in TINY_FAMILIES.items() if not tiny.shares_layers and not tiny.decoder]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["bert", "deberta-v3", "gpt2", "llama", "gemma2"])
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family of each form."""
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("albert", tmp_path_factory.mktemp("albert"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("bert", tmp_path_factory.mktemp("bert"))


class Dense:
    """BERT's layers written down, over one example after the other, in float64.

    `hidden` and what its methods return have one tensor (tokens, width) per example.
    """

    def __init__(self, state: Tensors, examples: Sequence[Tensors]) -> None:
        self.state = {name.removeprefix("bert."): tensor.double() for name, tensor in state.items()}
        self.layer = ""
        words, positions, types = (
            self.state[f"embeddings.{what}_embeddings.weight"] for what in ("word", "position", "token_type")
        )
        self.hidden = [
            self.norm(
                words[e["input_ids"]] + types[e["token_type_ids"]] + positions[: len(e["input_ids"])], "embeddings"
            )
            for e in examples
        ]

    def name(self, module: str) -> str:
        return module if module.startswith(("embeddings", "pooler")) else f"encoder.layer.{self.layer}.{module}"

    def norm(self, x: Tensor, module: str) -> Tensor:
        name = f"{self.name(module)}.LayerNorm"
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-12)

    def linear(self, xs: Sequence[Tensor], module: str) -> list[Tensor]:
        name = self.name(module)
        return [x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", torch.zeros(1)) for x in xs]

    def contexts(self) -> list[Tensor]:
        found = []
        for projected in zip(
            *(self.linear(self.hidden, f"attention.self.{what}") for what in ("query", "key", "value")), strict=True
        ):
            q, k, v = (p.view(len(p), HEADS, -1).transpose(0, 1) for p in projected)
            probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            found.append((probabilities @ v).transpose(0, 1).flatten(1))
        return found

    def summed(self, xs: Sequence[Tensor], module: str) -> list[Tensor]:
        return [y + h for y, h in zip(self.linear(xs, module), self.hidden, strict=True)]


def as_given(name: str) -> tuple[Sequence[float], float]:
    """The experts' weights and `hold`, of a linear layer by its path in BERT."""
    return WEIGHTS, HOLD


def fit(
    ours: Sequence[Dense],
    module: str,
    xs: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    settings: Callable[[str], tuple[Sequence[float], float]],
) -> None:
    """Change a layer of the merge, which all of `ours` share, to the least squares solution towards `targets`.

    These are what its outputs should be, per model and example. A ridge is a further row for every coefficient.
    """
    state, name = ours[0].state, ours[0].name(module)
    weights, hold = settings(name)
    has_bias = f"{name}.bias" in state
    start = state[f"{name}.weight"]
    if has_bias:
        start = torch.cat([start, state[f"{name}.bias"][:, None]], dim=1)
    rows, wanted = [], []
    for weight, x_by_example, y in zip(weights, xs, targets, strict=True):
        x = torch.cat(list(x_by_example))
        if has_bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        share = (weight / sum(weights) / len(x)) ** 0.5
        rows.append(share * x)
        wanted.append(share * (torch.cat(list(y)) - x @ start.T))
    energy = torch.cat(rows).square().sum(0)
    held = (hold * energy + RIDGE * energy.mean()).sqrt().diag()
    stacked = torch.cat([*rows, held])
    step = torch.linalg.lstsq(stacked, torch.cat([*wanted, held.new_zeros(len(held), len(start))])).solution.T
    fitted = start + step
    for one in ours:
        one.state[f"{name}.weight"] = fitted[:, :-1] if has_bias else fitted
        if has_bias:
            one.state[f"{name}.bias"] = fitted[:, -1]


def dense_alignment(
    start: Tensors,
    experts: Sequence[Tensors],
    rows: Sequence[Sequence[Tensors]],
    settings: Callable[[str], tuple[Sequence[float], float]] = as_given,
) -> dict[str, Tensor]:
    ours = [Dense(start, examples) for examples in rows]
    theirs = [Dense(state, examples) for state, examples in zip(experts, rows, strict=True)]
    everyone = [*ours, *theirs]
    pairs = list(zip(ours, theirs, strict=True))

    def refit(module: str, our_xs: list[list[Tensor]], their_xs: list[list[Tensor]], residual: bool) -> None:
        targets = []
        for (our, their), xs in zip(pairs, their_xs, strict=True):
            wanted = their.summed(xs, module) if residual else their.linear(xs, module)
            targets.append([w - h for w, h in zip(wanted, our.hidden, strict=True)] if residual else wanted)
        fit(ours, module, our_xs, targets, settings)

    for layer in range(LAYERS):
        for one in everyone:
            one.layer = str(layer)
        for what in ("query", "key", "value"):
            refit(f"attention.self.{what}", [o.hidden for o in ours], [t.hidden for t in theirs], False)
        contexts = {one: one.contexts() for one in everyone}
        refit("attention.output.dense", [contexts[o] for o in ours], [contexts[t] for t in theirs], True)
        for one in everyone:
            sums = one.summed(contexts[one], "attention.output.dense")
            one.hidden = [one.norm(x, "attention.output") for x in sums]
        refit("intermediate.dense", [o.hidden for o in ours], [t.hidden for t in theirs], False)
        neurons = {one: [gelu(x) for x in one.linear(one.hidden, "intermediate.dense")] for one in everyone}
        refit("output.dense", [neurons[o] for o in ours], [neurons[t] for t in theirs], True)
        for one in everyone:
            one.hidden = [one.norm(x, "output") for x in one.summed(neurons[one], "output.dense")]
    first = {one: [h[:1] for h in one.hidden] for one in everyone}
    refit("pooler.dense", [first[o] for o in ours], [first[t] for t in theirs], False)
    return {f"bert.{name}": tensor for name, tensor in ours[0].state.items()}


@pytest.mark.parametrize(
    "without_bias", [(), ("query", "key", "value"), ("intermediate.dense", "output.dense")], ids=str
)
def test_the_merge_is_the_sequence_of_least_squares_fits(bert: Case, without_bias: tuple[str, ...]) -> None:
    experts, merged = bert.experts(), bert.average()
    for model in (merged, *(expert.loaded.model for expert in experts)):
        for name, module in model.get_submodule("bert.encoder").named_modules():
            if isinstance(module, nn.Linear) and name.endswith(without_bias):
                module.register_parameter("bias", None)
    start = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    rows = [[{k: torch.tensor(v) for k, v in e.encoding.items()} for e in expert.examples] for expert in experts]
    expected = dense_alignment(start, [expert.loaded.model.state_dict() for expert in experts], rows)
    changes = bert.align(experts, merged)
    layers = {name for name in start if name.endswith("weight") and (".self." in name or "dense" in name)}
    assert changes.keys() == layers | {name.replace("weight", "bias") for name in layers} & start.keys()
    for name, tensor in merged.state_dict().items():
        if name.startswith("bert."):
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-4, msg=name)
            torch.testing.assert_close(tensor, start[name] + changes.get(name, 0.0), rtol=0, atol=1e-6, msg=name)
    moved = max(float(change.abs().max()) for change in changes.values())
    assert moved > 0.05  # it is not the start that was compared


def test_weights_and_hold_are_those_of_each_layer(bert: Case) -> None:
    """Layers that read the same, as query and key, may differ in them."""

    def settings(name: str) -> tuple[Sequence[float], float]:
        layer = int(name.split(".")[2]) if "layer" in name else LAYERS - 1
        return (0.0 if name.endswith("key") else 1.0, 0.5), 0.1 + 0.4 * layer / (LAYERS - 1)

    first, second = bert.experts()
    but_for_keys = TypeAdapter(PerTensor[float]).validate_python([{"filter": "*.key.weight", "value": 0}])
    experts, merged = [replace(first, weight=but_for_keys), replace(second, weight=0.5)], bert.average()
    start = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    rows = [[{k: torch.tensor(v) for k, v in e.encoding.items()} for e in expert.examples] for expert in experts]
    expected = dense_alignment(start, [expert.loaded.model.state_dict() for expert in experts], rows, settings)
    bert.align(experts, merged, [0.1, 0.5])
    for name, tensor in merged.state_dict().items():
        if name.startswith("bert."):
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-4, msg=name)


def test_a_step_is_the_ridge_regression_of_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    x, e = (torch.randn(60, width, generator=generator, dtype=torch.float64) for width in (8, 3))
    x[:, 0] *= 10
    step = ridge_step(x.T @ x / 60, e.T @ x / 60, HOLD)
    energy = x.square().mean(0)
    held = (60 * (HOLD * energy + RIDGE * energy.mean())).sqrt().diag()
    expected = torch.linalg.lstsq(torch.cat([x, held]), torch.cat([e, e.new_zeros(8, 3)])).solution.T
    torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(NumericalError, match="raise hold"):
        ridge_step(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), e.new_zeros(1, 2), HOLD)


def test_every_linear_layer_of_the_blocks_is_refitted_once(case: Case) -> None:
    groups = linear_groups(case.plan)
    kinds = {k for k in required_family(case.plan).layer_kinds.values() if k not in NO_MATRICES}
    assert [group.layer for group in groups if group.layer is not None] == [i for i in range(LAYERS) for _ in range(4)]
    modules = [module for group in groups for module in group.modules]
    slots = [required_family(case.plan).slot(f"{module}.weight") for module in modules]
    assert len(set(modules)) == len(modules) == LAYERS * len(kinds) + any(s and s.kind is Kind.POOLER for s in slots)
    adds_attention = case.norms in (Norms.AFTER_SUMS, Norms.BEFORE_BLOCKS)  # as it is, and before the next block
    adds_feed_forward = case.norms is not Norms.AFTER_BLOCKS
    assert [bool(group.norm or group.ends_block) for group in groups[:4]] == [
        False,
        adds_attention,
        False,
        adds_feed_forward,
    ]


def keep_input(seen: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen.append(inputs[0])


def test_each_layer_gets_what_it_gets_in_the_model(case: Case) -> None:
    """With the mask and the positions of its own kind, for rows longer than any window."""
    loaded, groups = case.loaded(case.folders[0]), linear_groups(case.plan)
    expert = case.expert(case.folders[0], case.folders[0].with_suffix(".jsonl"), 1.0)
    comparison = Comparison(expert, loaded.model, stacks_of(case.plan), "float32", keeping=0)
    batches = list(collate(plan_batches(expert.examples), loaded.padding, CPU))
    assert max(example.length for example in expert.examples) > 20
    for layer in range(LAYERS):
        with torch.inference_mode():
            of_layer = [group for group in groups if group.layer == layer]
            comparison.enter(layer, of_layer)
            for group in of_layer:
                found = [inputs for [(inputs, _)] in comparison.samples([group])]
                for batch, x in zip(batches, found, strict=True):
                    seen: list[Tensor] = []
                    reader = expert.loaded.model.get_submodule(group.reader)
                    handle = reader.register_forward_pre_hook(partial(keep_input, seen))
                    expert.loaded.kind.run(batch.inputs)
                    handle.remove()
                    is_text = batch.inputs["attention_mask"].bool().flatten()
                    torch.testing.assert_close(x, seen[0].flatten(0, -2)[is_text], rtol=1e-5, atol=1e-5)


def test_what_is_kept_of_a_layer_spares_passes_and_changes_nothing(form: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for keeping in (0, 10**9):
        monkeypatch.setattr(layer_alignment, "most_tokens_kept", lambda hidden, keeping=keeping: keeping)
        found.append(form.align(form.experts(), form.average()))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def read_in_all_uses(model: nn.Module, expert: Expert, path: str) -> Tensor:
    """What a module reads each time that it runs, one row at a time, (tokens of all uses and rows, width)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(partial(keep_input, seen))
    with torch.no_grad():
        for example in expert.examples:
            model(**{key: torch.tensor([ids]) for key, ids in example.encoding.items()})
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def test_a_layer_that_is_run_several_times_is_fitted_to_all_of_its_uses(
    albert: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step, against least squares on passes of the whole model; and all steps lead nearer to the experts."""
    monkeypatch.setattr(layer_alignment, "TURNS", 1)
    experts, merged, start = albert.experts(), albert.average(), albert.average()
    changes = albert.align(experts, merged)
    group, last = linear_groups(albert.plan)[0], linear_groups(albert.plan)[3]
    assert group.input == "layers.0.attention"
    assert last.norm is not None
    rows, wanted = [], []
    for expert, weight in zip(experts, WEIGHTS, strict=True):
        ours, theirs = (read_in_all_uses(model, expert, group.reader) for model in (start, expert.loaded.model))
        assert len(ours) == LAYERS * sum(example.length for example in expert.examples)
        with torch.no_grad():
            given = [
                torch.cat([model.get_submodule(path)(x) for path in group.modules], dim=1)
                for model, x in ((start, ours), (expert.loaded.model, theirs))
            ]
        share = (weight / sum(WEIGHTS) / len(ours)) ** 0.5
        rows.append(share * torch.cat([ours, ours.new_ones(len(ours), 1)], dim=1).double())
        wanted.append(share * (given[1] - given[0]).double())
    energy = torch.cat(rows).square().sum(0)
    held = (HOLD * energy + RIDGE * energy.mean()).sqrt().diag()
    zeros = held.new_zeros(len(held), wanted[0].shape[1])
    expected = torch.linalg.lstsq(torch.cat([*rows, held]), torch.cat([*wanted, zeros])).solution.T
    found = torch.cat(
        [torch.cat([changes[f"{m}.weight"], changes[f"{m}.bias"][:, None]], dim=1) for m in group.modules]
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    off = [0.0, 0.0]
    for expert, weight in zip(experts, WEIGHTS, strict=True):
        theirs = read_in_all_uses(expert.loaded.model, expert, last.norm)
        for place, model in enumerate((merged, start)):
            off[place] += weight * float((read_in_all_uses(model, expert, last.norm) - theirs).square().mean())
    assert off[0] < 0.9 * off[1]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(
            tensor, start.state_dict()[name] + changes.get(name, 0.0), rtol=0, atol=1e-5, msg=name
        )


def test_steps_that_lead_away_are_left_out(albert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the wrong sign leads away however short it is."""
    right = ridge_step
    monkeypatch.setattr(regression, "ridge_step", lambda moment, error, hold: -right(moment, error, hold))
    merged, start = albert.average(), albert.average()
    changes = albert.align(albert.experts(), merged)
    assert {name.split(".")[1] for name in changes} == {"pooler"}
    for name, tensor in merged.state_dict().items():
        if "pooler" not in name:
            torch.testing.assert_close(tensor, start.state_dict()[name], rtol=0, atol=1e-5, msg=name)


def test_shared_layers_of_experts_that_are_the_start_stay_as_they_are(albert: Case) -> None:
    first, second = albert.folders
    experts = [albert.expert(first, folder.with_suffix(".jsonl"), 1.0) for folder in (first, second)]
    changes = albert.align(experts, albert.loaded(first).model)
    assert max((float(change.abs().max()) for change in changes.values()), default=0.0) < 1e-5


def test_methods_that_refit_whole_blocks_are_refused_where_layers_share_their_weights(albert: Case) -> None:
    blocks = RegMeanPlusParameters()
    for method in (blocks, AutoParameters(candidates=[blocks, RegMeanParameters()])):
        infos = [inspect_checkpoint(folder, folder.name) for folder in albert.folders]
        with pytest.raises(InvalidCheckpoint, match=r"layers of this architecture are one; (use regmean|name)"):
            plan_job(method, ["two", "three"], infos, OutputSpec(), None)


def test_experts_that_are_the_start_leave_it_as_it_is(form: Case) -> None:
    first, second = form.folders
    experts = [form.expert(first, folder.with_suffix(".jsonl"), 1.0) for folder in (first, second)]
    merged = form.loaded(first).model
    changes = form.align(experts, merged)
    assert max(float(change.abs().max()) for change in changes.values()) < 1e-5
    for model in (merged, *(expert.loaded.model for expert in experts)):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_rounding_for_passes_does_not_move_what_is_right(bert: Case) -> None:
    first, second = bert.folders
    experts = [bert.expert(first, folder.with_suffix(".jsonl"), 1.0) for folder in (first, second)]
    parameters, merged = AlignedRegMeanParameters(), bert.loaded(first).model
    changes = align_layers(bert.plan, experts, merged, parameters, "bfloat16", lambda: None)
    assert max(float(change.abs().max()) for change in changes.values()) < 1e-6


def residual_sums(case: Case, folder: Path, expert: Path) -> list[Tensor]:
    """Of a model on an expert's rows, one at a time: the sums as norms read them, in that order, (tokens, width)."""
    model = float64_model(folder)
    seen: dict[nn.Module, list[Tensor]] = {}
    norms, by_block = case.norms, (Norms.AFTER_BLOCKS, Norms.PARALLEL)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(module, []).append(inputs[0].flatten(0, -2))

    for name, module in model.named_modules():
        slot = required_family(case.plan).slot(f"{name}.weight")
        is_norm = slot is not None and slot.kind in NORMS and norms not in by_block
        if (
            is_norm
            or (slot is not None and slot.kind is Kind.FINAL_NORM)
            or (norms in by_block and isinstance(module, GradientCheckpointingLayer))
        ):
            module.register_forward_pre_hook(before)
    with torch.no_grad():
        for example in case.expert(expert, expert.with_suffix(".jsonl"), 1.0).examples:
            model(**{key: torch.tensor([ids]) for key, ids in example.encoding.items()})
    sums = [torch.cat(sums) for sums in seen.values()]
    reads_embeddings = norms is not Norms.AFTER_SUMS and not required_family(case.plan).absent_in_first_layer
    return sums[1:] if reads_embeddings else sums


def residual_errors(case: Case, folder: Path, expert: Path) -> list[float]:
    """By norm: the mean square of what a merge's residual sum is off the expert's."""
    pairs = zip(residual_sums(case, folder, expert), residual_sums(case, expert, expert), strict=True)
    return [float((ours - theirs).square().mean()) for ours, theirs in pairs]


def test_residual_sums_come_nearer_to_the_experts(form: Case, tmp_path: Path) -> None:
    assert_residual_sums_come_nearer(form, tmp_path)


@pytest.mark.long
def test_residual_sums_come_nearer_to_the_experts_in_every_family(case: Case, tmp_path: Path) -> None:
    assert_residual_sums_come_nearer(case, tmp_path)


def assert_residual_sums_come_nearer(case: Case, tmp_path: Path) -> None:
    plain = case.merge(tmp_path / "plain", name="regmean")
    aligned = case.merge(tmp_path / "aligned", name="aligned_regmean")
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    by_method = []
    for merged in (plain, aligned):
        errors = [residual_errors(case, folder, expert) for folder, expert in zip(merged, case.folders, strict=True)]
        sums = LAYERS * (1 if case.norms in (Norms.AFTER_BLOCKS, Norms.PARALLEL) else 2)
        assert [len(of_model) for of_model in errors] == [sums] * 2
        by_method.append([sum(s * e for s, e in zip(shares, pair, strict=True)) for pair in zip(*errors, strict=True)])
    for before, after in zip(*by_method, strict=True):
        assert after < before


def test_scale_applies_to_the_refitted_layers(bert: Case, tmp_path: Path) -> None:
    [whole, *_] = bert.merge(tmp_path / "whole", name="aligned_regmean")
    [half, *_] = bert.merge(tmp_path / "half", name="aligned_regmean", scale=0.5, base=True)
    base, merged, found = (read_model(folder) for folder in (bert.base, whole, half))
    for name, ancestor in base.items():
        expected = ancestor + 0.5 * (merged[f"bert.{name}"] - ancestor)
        torch.testing.assert_close(found[f"bert.{name}"], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("start", "scale"),
    [({"name": "average", "scale": 0.25}, 0.25), ("task_arithmetic", None)],
    ids=["average", "task_arithmetic"],
)
def test_layers_are_refitted_from_the_start_that_is_named(
    bert: Case, tmp_path: Path, start: str | dict[str, Any], scale: float | None
) -> None:
    [merged, *_] = bert.merge(tmp_path / "merged", name="aligned_regmean", start=start, hold=HOLD, base=True)
    base, *theirs = (read_model(folder) for folder in (bert.base, *bert.folders))
    shares = [0.4 * weight if scale is None else scale * weight / sum(WEIGHTS) for weight in WEIGHTS]
    begun = bert.loaded(bert.folders[0]).model
    with torch.no_grad():
        for name, ancestor in base.items():
            moved = sum(share * (own[f"bert.{name}"] - ancestor) for share, own in zip(shares, theirs, strict=True))
            begun.get_parameter(f"bert.{name}").copy_(ancestor + moved)
    bert.align(bert.experts(), begun)
    found = read_model(merged)
    for name, tensor in begun.state_dict().items():
        if name.startswith("bert.") and name in found:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_progress_counts_every_group_of_layers(bert: Case, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(phase: str, done: int, total: int, *_: object) -> None:
        if phase == "merging":
            seen.append((done, total))

    models = [model_spec(path, path.with_suffix(".jsonl")) for path in bert.folders]
    Engine(CPU).merge(merge_spec(tmp_path, models, {"name": "aligned_regmean"}), watch)
    tensors = len(bert.plan.backbone) + sum(map(len, bert.plan.heads))
    total = tensors + 4 * LAYERS + 1
    assert seen == [(done, total) for done in range(total + 1)]


def test_an_overflow_is_named_with_its_row(bert: Case) -> None:
    experts, merged = bert.experts(), bert.average()
    word = experts[1].examples[3].encoding["input_ids"][1]
    with torch.no_grad():
        merged.get_parameter("bert.embeddings.word_embeddings.weight")[word] = torch.inf
    with pytest.raises(
        NumericalError, match=r"layers\.0\.attention .* NaN or infinite at \w+\.jsonl, line \d+"
    ) as caught:
        bert.align(experts, merged)
    examples = [e for expert in experts if expert.source == caught.value.detail["source"] for e in expert.examples]
    assert caught.value.detail["line"] in {e.place.number for e in examples if word in e.encoding["input_ids"]}
