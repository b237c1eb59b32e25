"""`featcal` and `regmean_plus`: against numbers of the authors' code, and the same fits written down block by block."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from tests.parity.test_layers import LAYERS, WEIGHTS, Case, Dense
from tests.tiny import Tensors, dataset_spec, read_model, read_rows, write_rows
from tests.tiny_embeddings import embedding_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.merging.methods.blocks import MeasuredModel
from worker.engine.merging.methods.featcal import LinearSums, NormSums, calibrated_linear, calibrated_norm
from worker.engine.merging.methods.regmean import regress
from worker.engine.merging.refits.block_refits import pairs_of
from worker.engine.merging.refits.comparison import Expert
from worker.engine.merging.refits.linear_groups import linear_groups
from worker.engine.models.loading import load

STRENGTH, ANCHOR, TEACHER, UNREAD = 0.05, 2.2, 0.25, 0.01
SHARES = [2 * weight / sum(WEIGHTS) for weight in WEIGHTS]
LINEAR = (
    *(f"attention.self.{what}" for what in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
NORMS = ("attention.output", "output")
Inputs = dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("bert", tmp_path_factory.mktemp("bert"))


def test_solutions_have_the_numbers_of_the_authors_code() -> None:
    """Those of featcal/solver.py at egangu/featcal 18c68b6, and of regmean_params_merge at nthehai01/RegMean-plusplus
    8f4bf1f, both in float32."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    xs = [normal(6, 3) for _ in range(2)]
    shifts = [0.5 * normal(6, 3) for _ in range(2)]
    weights = [normal(2, 3) for _ in range(2)]
    biases = [normal(2) for _ in range(2)]
    start, start_bias, base, base_bias = normal(2, 3), normal(2), normal(2, 3), normal(2)
    sums = []
    for x, d in zip(xs, shifts, strict=True):
        augmented = torch.cat([x, torch.ones(6, 1)], dim=1).double()
        sums.append(LinearSums(augmented.T @ augmented / 6, d.double().T @ augmented / 6))
    layers = [torch.cat([w, b[:, None]], dim=1).double() for w, b in zip(weights, biases, strict=True)]
    begun, ancestor = (torch.cat([w, b[:, None]], dim=1).double() for w, b in ((start, start_bias), (base, base_bias)))
    ones = torch.ones(2, dtype=torch.float64)
    anchor = ancestor + ANCHOR * (begun - ancestor)
    solved = calibrated_linear(sums, layers, ones, anchor, teacher=TEACHER, strength=STRENGTH)
    expected = torch.tensor(
        [[0.6633680, 1.1827409, -0.2580776, -0.2136008], [-0.1683905, -1.6102763, 0.8117236, 1.0771919]]
    )
    torch.testing.assert_close(solved, expected.double(), rtol=0, atol=2e-6)

    factors = [torch.rand(3, generator=generator) + 0.5 for _ in range(2)]
    moved = [normal(3) for _ in range(2)]
    factor, shift, factor_0, shift_0 = (normal(3).double() for _ in range(4))
    zs = [layer_norm(x, (3,)).double() for x in xs]
    found = calibrated_norm(
        [NormSums(z.sum(0), z.square().sum(0), torch.tensor([6.0])) for z in zs],
        [(f.double(), m.double()) for f, m in zip(factors, moved, strict=True)],
        ones,
        (factor_0 + ANCHOR * (factor - factor_0), shift_0 + ANCHOR * (shift - shift_0)),
        STRENGTH,
    )
    expected = torch.tensor([[0.9316854, 0.9054641, 1.0997093], [-0.6892288, 0.8775827, 0.3134628]])
    torch.testing.assert_close(torch.stack(found), expected.double(), rtol=0, atol=2e-6)

    merged = regress("x", weights, [MeasuredModel(1.0, grams={"x": x.T @ x / 6}) for x in xs], ones[:, None], 0.95, 0.0)
    expected = torch.tensor([[1.1404598, 0.9990337, 0.1455597], [-0.4911755, -1.6292905, 0.8998572]])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def passed(one: Dense) -> Inputs:
    """Run a block of BERT, and return what its linear layers and norms read."""
    seen = {f"attention.self.{what}": one.hidden for what in ("query", "key", "value")}
    seen["attention.output.dense"] = one.contexts()
    seen["attention.output"] = one.summed(seen["attention.output.dense"], "attention.output.dense")
    one.hidden = [one.norm(x, "attention.output") for x in seen["attention.output"]]
    seen["intermediate.dense"] = one.hidden
    seen["output.dense"] = [gelu(x) for x in one.linear(one.hidden, "intermediate.dense")]
    seen["output"] = one.summed(seen["output.dense"], "output.dense")
    one.hidden = [one.norm(x, "output") for x in seen["output"]]
    return seen


def stacked(parts: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Return the solution X of `min sum_i factor_i |A_i X - B_i|^2`."""
    left = torch.cat([factor**0.5 * a for factor, a, _ in parts])
    right = torch.cat([factor**0.5 * b for factor, _, b in parts])
    solution: Tensor = torch.linalg.lstsq(left, right).solution
    return solution


def running(bert: Case, start: Tensors) -> tuple[list[Dense], list[Dense]]:
    """The start and each expert on the expert's rows."""
    experts = bert.experts()
    rows = [[{k: torch.tensor(v) for k, v in e.encoding.items()} for e in expert.examples] for expert in experts]
    theirs = [Dense(expert.loaded.model.state_dict(), r) for expert, r in zip(experts, rows, strict=True)]
    return [Dense(start, r) for r in rows], theirs


def compared(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in found.items():
        if name.startswith("bert."):
            torch.testing.assert_close(
                tensor.double(), expected[name.removeprefix("bert.")], rtol=0, atol=2e-4, msg=name
            )


def mixed(bert: Case, scale: float | None) -> Tensors:
    """The experts' average, or task arithmetic with a scale."""
    base, *theirs = (read_model(folder) for folder in (bert.base, *bert.folders))
    shares = [weight / sum(WEIGHTS) if scale is None else scale * weight for weight in WEIGHTS]
    return {
        f"bert.{name}": ancestor
        + sum(share * (own[f"bert.{name}"] - ancestor) for share, own in zip(shares, theirs, strict=True))
        for name, ancestor in base.items()
    }


def test_regmean_plus_is_regmean_on_what_merged_blocks_give(bert: Case, tmp_path: Path) -> None:
    [merged, *_] = bert.merge(tmp_path / "merged", name="regmean_plus", shrink=0.9, ridge=0.0)
    ours, theirs = running(bert, mixed(bert, None))
    for one in ours:
        one.state = ours[0].state

    def solve(modules: Sequence[str], seen: Sequence[Inputs]) -> None:
        for module in modules:
            left = right = torch.zeros((), dtype=torch.float64)
            for weight, own, inputs in zip(WEIGHTS, theirs, seen, strict=True):
                x = torch.cat(inputs[module])
                gram = x.T @ x / len(x)
                gram = 0.9 * gram + 0.1 * gram.diag().diag()
                left = left + weight * gram
                right = right + weight * (own.state[f"{own.name(module)}.weight"] @ gram)
            ours[0].state[f"{ours[0].name(module)}.weight"] = right @ torch.linalg.pinv(left)

    for layer in range(LAYERS):
        for one in (*ours, *theirs):
            one.layer = str(layer)
        for own, mine in zip(theirs, ours, strict=True):
            own.hidden = mine.hidden
        solve(LINEAR, [passed(own) for own in theirs])
        for mine in ours:
            passed(mine)
    solve(["pooler.dense"], [{"pooler.dense": [h[:1] for h in mine.hidden]} for mine in ours])
    compared(read_model(merged), ours[0].state)


def test_featcal_fits_blocks_to_experts_and_anchor(bert: Case, tmp_path: Path) -> None:
    [merged, *_] = bert.merge(tmp_path / "merged", name="featcal", base=True)
    ours, theirs = running(bert, mixed(bert, 0.3))
    base = {name: tensor.double() for name, tensor in read_model(bert.base).items()}
    state = ours[0].state
    anchors = {name: base[name] + ANCHOR * (tensor - base[name]) for name, tensor in state.items() if name in base}
    for one in ours:
        one.state = state
    for layer in range(LAYERS):
        for one in (*ours, *theirs):
            one.layer = str(layer)
        begun = [mine.hidden for mine in ours]
        seen = [passed(mine) for mine in ours]
        asked = [passed(own) for own in theirs]
        new: dict[str, Tensor] = {}
        for module in (*LINEAR, *NORMS):
            name = ours[0].name(module)
            weighs_all = layer < LAYERS - 1 or module.endswith(("key", "value"))
            weights = []
            for inputs in seen:
                of_rows = [torch.full((len(x),), 1.0 if weighs_all else UNREAD) for x in inputs[module]]
                for of_row in of_rows:
                    of_row[0] = 1.0  # what the pooler reads
                weights.append(torch.cat(of_rows).double() / torch.cat(of_rows).sum())
            if module in NORMS:
                new |= calibrated(f"{name}.LayerNorm", module, seen, weights, theirs, anchors)
                continue
            parts, means = (
                [(STRENGTH, torch.eye(len(anchors[f"{name}.weight"].T)).double(), anchors[f"{name}.weight"].T)],
                [],
            )
            for share, own, mine, wanted, w in zip(SHARES, theirs, seen, asked, weights, strict=True):
                x, y = torch.cat(mine[module]), torch.cat(wanted[module])
                target = TEACHER * y + (1 - TEACHER) * x
                scale = share / (x.T @ (w[:, None] * x)).norm()
                root = w[:, None].sqrt()
                own_weight, own_bias = own.state[f"{name}.weight"], own.state[f"{name}.bias"]
                parts.append((float(scale), root * x, root * (target @ own_weight.T)))
                means.append((scale, own_bias + own_weight @ (w @ target), w @ x))
            solved = stacked(parts).T
            total = STRENGTH * anchors[f"{name}.bias"] + sum(s * (y - solved @ x) for s, y, x in means)
            new |= {f"{name}.weight": solved, f"{name}.bias": total / (STRENGTH + sum(s for s, _, _ in means))}
        state |= new
        for one, hidden in zip(ours, begun, strict=True):
            one.hidden = hidden
            passed(one)
    compared(read_model(merged), state)


def calibrated(
    name: str,
    module: str,
    seen: Sequence[Inputs],
    weights: Sequence[Tensor],
    theirs: Sequence[Dense],
    anchors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Factor and shift of a layer norm, value by value."""
    zs = [layer_norm(torch.cat(inputs[module]), anchors[f"{name}.weight"].shape, eps=1e-12) for inputs in seen]
    solved = []
    for column in range(zs[0].shape[1]):
        anchor = torch.stack([anchors[f"{name}.weight"][column], anchors[f"{name}.bias"][column]])[:, None]
        parts: list[tuple[float, Tensor, Tensor]] = [(STRENGTH, torch.eye(2).double(), anchor)]
        for share, own, z, w in zip(SHARES, theirs, zs, weights, strict=True):
            x = torch.stack([z[:, column], torch.ones(len(z)).double()], dim=1)
            own_norm = torch.stack([own.state[f"{name}.weight"][column], own.state[f"{name}.bias"][column]])[:, None]
            parts.append((share, w[:, None].sqrt() * x, w[:, None].sqrt() * (x @ own_norm)))
        solved.append(stacked(parts)[:, 0])
    factor, shift = torch.stack(solved, dim=1)
    return {f"{name}.weight": factor, f"{name}.bias": shift}


@pytest.mark.parametrize("method", ["featcal", "regmean_plus"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "deberta-v2"])
def test_linear_layers_of_other_forms_are_solved_for(method: str, family: str, tmp_path: Path) -> None:
    case = Case(family, tmp_path)
    found: dict[str, Any] = {}
    for name in ("average", method):
        [merged, *_] = case.merge(tmp_path / name, name=name, base=True, precision="bfloat16")
        found[name] = read_model(merged)
    changed = [key for key, tensor in found[method].items() if not torch.equal(tensor, found["average"][key])]
    assert len(changed) >= LAYERS * 4
    assert all(bool(tensor.isfinite().all()) for tensor in found[method].values())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_tokens_that_embeddings_of_length_1_depend_on_are_those_that_are_pooled(
    pooling: str, tmp_path: Path
) -> None:
    """The sum of their squares depends on none."""
    info = inspect_checkpoint(embedding_model(tmp_path / "one", 1, pooling, "normalize"), "one")
    plan, loaded = plan_merge([info]), load(info, torch.device("cpu"))
    file = write_rows(tmp_path / "rows.jsonl", count=12, labels=1)
    read = loaded.kind.tokenized(read_rows(file), dataset_spec(file), loaded.tokenizer, loaded.max_length, None)
    groups = linear_groups(plan)
    with pairs_of(plan, [Expert(loaded, 1.0, read.examples, "rows")], loaded.model, "float32") as [pair]:
        for layer in range(info.config["num_hidden_layers"]):
            of_layer = [group for group in groups if group.layer == layer]
            pair.theirs.enter(layer, of_layer)
        pair.theirs.read(0, of_layer[0], [of_layer[0].reader])
        found = pair.theirs.tokens_read(0)
    lengths = [example.length for example in read.examples]
    assert (pair.batches, len(found)) == (1, sum(lengths))
    assert int(found.sum()) == (len(lengths) if pooling == "cls" else sum(lengths))
