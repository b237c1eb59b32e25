"""Fused matrices: whose slices they have, against attention and feed-forward layers as transformers runs them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    Phi3Model,
)
from transformers.pytorch_utils import Conv1D

from tests.tiny import merged_of
from worker.engine.catalog.families import HEADS, KV_HEADS, NEURONS, Family, Fused, Kind, NodeKind, ScoreName, Slot
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.table import GROUPED_QUERY, MULTI_HEAD, Ownership
from worker.engine.catalog.methods import MaskFisherParameters, MaskRegMeanParameters, RegMeanParameters
from worker.engine.merging.methods import mask_fisher, mask_regmean, regmean
from worker.engine.merging.methods.blocks import MeasuredModel
from worker.engine.merging.methods.combine import of_slices
from worker.engine.merging.refits.layer_alignment import refit_groups
from worker.engine.merging.refits.linear_groups import LinearGroup
from worker.engine.merging.refits.regression import LayerSettings

HEAD_COUNT, KV_COUNT, NEURON_COUNT, SIZE = 4, 2, 10, 6  # width of a head
HIDDEN = HEAD_COUNT * SIZE
QKV = (Kind.QUERY, Kind.KEY, Kind.VALUE)


@dataclass(frozen=True)
class Case:
    """A model, and the fused modules of its first layer: those whose rows nodes own, and those that read the nodes."""

    model: Callable[[], Any]
    attention: tuple[str, Fused, str, Kind | Fused]
    feed_forward: tuple[str, Kind | Fused, str, Kind | Fused]
    layers: str
    ownership: Ownership = MULTI_HEAD
    kv_heads: int = HEAD_COUNT

    @property
    def family(self) -> Family:
        modules = dict([self.attention[:2], self.attention[2:], self.feed_forward[:2], self.feed_forward[2:]])
        return replace(BERT, prefix="", layers=self.layers, layer_modules=modules, ownership=self.ownership)

    def counts(self, kind: NodeKind) -> int:
        return {HEADS: HEAD_COUNT, KV_HEADS: self.kv_heads, NEURONS: NEURON_COUNT}[kind]


def conv1d(*parts: Kind) -> Fused:
    return Fused(parts, transposed=True)


ROTARY = {"hidden_size": HIDDEN, "intermediate_size": NEURON_COUNT, "num_attention_heads": HEAD_COUNT}
CASES = {
    "gpt2": Case(
        lambda: GPT2Model(GPT2Config(n_embd=HIDDEN, n_head=HEAD_COUNT, n_inner=NEURON_COUNT, n_layer=2, vocab_size=20)),
        ("attn.c_attn", conv1d(*QKV), "attn.c_proj", conv1d(Kind.ATTENTION_OUTPUT)),
        ("mlp.c_fc", conv1d(Kind.UP), "mlp.c_proj", conv1d(Kind.DOWN)),
        "h.{layer}",
    ),
    "gpt_neox": Case(
        lambda: GPTNeoXModel(GPTNeoXConfig(**ROTARY, num_hidden_layers=2, vocab_size=20)),
        ("attention.query_key_value", Fused(QKV, by_head=True), "attention.dense", Kind.ATTENTION_OUTPUT),
        ("mlp.dense_h_to_4h", Kind.UP, "mlp.dense_4h_to_h", Kind.DOWN),
        "layers.{layer}",
    ),
    "falcon": Case(
        lambda: FalconModel(
            FalconConfig(
                hidden_size=HIDDEN,
                num_attention_heads=HEAD_COUNT,
                num_kv_heads=KV_COUNT,
                ffn_hidden_size=NEURON_COUNT,
                num_hidden_layers=2,
                new_decoder_architecture=True,
                vocab_size=20,
            )
        ),
        ("self_attention.query_key_value", Fused(QKV, by_head=True), "self_attention.dense", Kind.ATTENTION_OUTPUT),
        ("mlp.dense_h_to_4h", Kind.UP, "mlp.dense_4h_to_h", Kind.DOWN),
        "h.{layer}",
        GROUPED_QUERY,
        KV_COUNT,
    ),
    "phi3": Case(
        lambda: Phi3Model(
            Phi3Config(**ROTARY, num_key_value_heads=KV_COUNT, num_hidden_layers=2, vocab_size=20, pad_token_id=0)
        ),
        ("self_attn.qkv_proj", Fused(QKV), "self_attn.o_proj", Kind.ATTENTION_OUTPUT),
        ("mlp.gate_up_proj", Fused((Kind.GATE, Kind.UP)), "mlp.down_proj", Kind.DOWN),
        "layers.{layer}",
        GROUPED_QUERY,
        KV_COUNT,
    ),
    "modernbert": Case(
        lambda: ModernBertModel(
            ModernBertConfig(**ROTARY, num_hidden_layers=2, vocab_size=20, pad_token_id=0, attention_bias=True)
        ),
        ("attn.Wqkv", Fused(QKV), "attn.Wo", Kind.ATTENTION_OUTPUT),
        ("mlp.Wi", Fused((Kind.GATE, Kind.UP)), "mlp.Wo", Kind.DOWN),
        "layers.{layer}",
    ),
}


def slot_of(family: Family, name: str) -> Slot:
    slot = family.slot(name)
    assert slot is not None, name
    return slot


def marked(case: Case, slot: Slot, kind: Kind, nodes: list[int], length: int) -> Tensor:
    """Mark the rows, or columns, of a kind's nodes: (length,)."""
    assert slot.owner is not None
    parts = [torch.zeros(1, case.counts(part.score.kind)) for part in slot.owner.parts]
    for part, values in zip(slot.owner.parts, parts, strict=True):
        if part.kind is kind:
            values[0, nodes] = 1
    found = of_slices(slot.owner, parts)[0]
    return found.repeat_interleave(length // len(found)).bool()


def scaled(case: Case, model: Any, module: str, kind: Kind, nodes: list[int]) -> Tensor:
    """Run a copy of the model with these nodes' slices in the first layer halved."""
    copy = case.model().double().eval()
    copy.load_state_dict(model.state_dict())
    start = case.family.layer_path(0)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            slot = case.family.slot(name)
            if name.startswith(f"{start}{module}.") and slot is not None and slot.owner is not None:
                axis = slot.owner.axis
                parameter.movedim(axis, 0)[marked(case, slot, kind, nodes, parameter.shape[axis])] *= 0.5
    return run(copy)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=torch.tensor([[3, 5, 7, 2, 11, 4]])).last_hidden_state
    return output


@pytest.mark.parametrize("name", CASES)
def test_a_fused_matrix_has_the_slices_of_the_nodes_that_the_next_matrix_reads(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    before = run(model)
    group = HEAD_COUNT // case.kv_heads
    writes, _, reads, _ = case.attention
    for node in range(case.kv_heads):  # halving values is halving the contexts of all heads that share them
        by_values = scaled(case, model, writes, Kind.VALUE, [node])
        heads = list(range(node * group, (node + 1) * group))
        by_contexts = scaled(case, model, reads, Kind.ATTENTION_OUTPUT, heads)
        assert not torch.allclose(by_values, before)
        torch.testing.assert_close(by_values, by_contexts, rtol=1e-9, atol=1e-9)
    writes, stored, reads, _ = case.feed_forward
    if isinstance(stored, Fused) and Kind.GATE in stored.parts:
        for node in range(NEURON_COUNT):
            by_rows = scaled(case, model, writes, Kind.UP, [node])
            torch.testing.assert_close(by_rows, scaled(case, model, reads, Kind.DOWN, [node]), rtol=1e-9, atol=1e-9)
    else:
        slot = slot_of(case.family, f"{case.family.layer_path(0)}{writes}.weight")
        assert slot.owner is not None
        assert (slot.owner.axis, slot.transposed) == ((1, True) if name == "gpt2" else (0, False))


@pytest.mark.parametrize("name", CASES)
def test_queries_and_keys_of_a_head_are_those_that_its_scores_come_of(name: str) -> None:
    """Where all keys of a head are 0, its queries do not matter; elsewhere they do."""
    case = CASES[name]
    torch.manual_seed(1)
    model = case.model().double().eval()
    path = case.family.layer_path(0) + case.attention[0]
    group = HEAD_COUNT // case.kv_heads
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        for end in ("weight", "bias"):
            parameter = dict(model.named_parameters()).get(f"{path}.{end}")
            if parameter is not None:
                owner = slot_of(case.family, f"{path}.{end}").owner
                assert owner is not None
                keys = marked(case, slot_of(case.family, f"{path}.{end}"), Kind.KEY, [1], parameter.shape[owner.axis])
                parameter.movedim(owner.axis, 0)[keys] = 0
    before = run(model)
    of_first, of_second = [0], [group]  # a head of the first key, and one of the second, which is 0
    torch.testing.assert_close(scaled(case, model, case.attention[0], Kind.QUERY, of_second), before)
    assert not torch.allclose(scaled(case, model, case.attention[0], Kind.QUERY, of_first), before)


# --- merging -------------------------------------------------------------------------------------------


def measured(case: Case, seed: int, inputs: int) -> MeasuredModel:
    drawn = torch.Generator().manual_seed(seed)
    scores = {
        ScoreName(0, kind): torch.rand(case.counts(kind), generator=drawn, dtype=torch.float64) + 0.1
        for kind in case.ownership.kinds
    }
    x = torch.randn(50, inputs, generator=drawn, dtype=torch.float64)
    grams = {f"layers.0.{name}": (x.T @ x / 50).float() for name in ("attention", "heads", "feed_forward", "neurons")}
    return MeasuredModel(weight=1.0, scores=scores, grams=grams)


def parts_of(case: Case, slot: Slot, matrix: Tensor) -> list[Tensor]:
    """Cut a fused matrix, (rows, inputs), into those of its kinds by shapes alone, as the models' code does."""
    assert slot.owner is not None
    counts = [case.counts(part.score.kind) for part in slot.owner.parts]
    size = len(matrix) // sum(counts)
    if not slot.owner.by_head:
        return list(torch.split(matrix, [count * size for count in counts]))
    groups = min(counts)
    by_group = matrix.view(groups, -1, size, *matrix.shape[1:])
    return [part.reshape(-1, *matrix.shape[1:]) for part in torch.split(by_group, [c // groups for c in counts], dim=1)]


FUSED = [(name, which) for name in CASES for which in ("attention", "feed_forward")]


@pytest.mark.parametrize(("name", "which"), FUSED)
@pytest.mark.parametrize("method", ["mask_fisher", "mask_regmean", "regmean"])
def test_each_part_is_merged_as_if_it_were_a_matrix_of_its_own(name: str, which: str, method: str) -> None:
    case = CASES[name]
    module, *_ = case.attention if which == "attention" else case.feed_forward
    slot = slot_of(case.family, f"{case.family.layer_path(0)}{module}.weight")
    assert slot.owner is not None
    rows = sum(case.counts(s.kind) * (SIZE if s.kind.width else 1) for s in slot.owner.scores)
    models = [measured(case, seed, HIDDEN) for seed in (1, 2)]
    built: Mapping[str, Any] = {
        "mask_fisher": lambda: mask_fisher.build(MaskFisherParameters(), models),
        "mask_regmean": lambda: mask_regmean.build(MaskRegMeanParameters(neuron_rows=True), models),
        "regmean": lambda: regmean.build(RegMeanParameters(), models),
    }
    merger = built[method]()
    whole = [torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    merged = merged_of(merger, slot, [m.T.contiguous() for m in whole] if slot.transposed else whole)
    found = parts_of(case, slot, merged.T.contiguous() if slot.transposed else merged)
    given = [parts_of(case, slot, matrix) for matrix in whole]
    single = replace(case.family, layer_modules={part.kind: part.kind for part in slot.owner.parts})
    for number, part in enumerate(slot.owner.parts):
        alone = slot_of(single, f"{case.family.layer_path(0)}{part.kind}.weight")
        expected = merged_of(merger, alone, [versions[number] for versions in given])
        torch.testing.assert_close(found[number], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "which"), FUSED)
def test_columns_of_a_transposed_matrix_are_merged_by_the_nodes_that_they_read(name: str, which: str) -> None:
    case = CASES[name]
    _, _, module, _ = case.attention if which == "attention" else case.feed_forward
    slot = slot_of(case.family, f"{case.family.layer_path(0)}{module}.weight")
    assert slot.owner is not None
    [kind] = slot.owner.kinds
    width = SIZE if kind.width else 1
    models = [measured(case, seed, HIDDEN) for seed in (1, 2)]
    whole = [torch.randn(HIDDEN, case.counts(kind) * width, dtype=torch.float64) for _ in models]
    merged = merged_of(
        mask_fisher.build(MaskFisherParameters(normalize="none", floor=0.0), models),
        slot,
        [m.T.contiguous() for m in whole] if slot.transposed else whole,
    )
    one, other = (model.scores[ScoreName(0, kind)].repeat_interleave(width) for model in models)
    expected = (whole[0] * one + whole[1] * other) / (one + other)
    torch.testing.assert_close(merged.T if slot.transposed else merged, expected)


class Given:
    """A comparison of which the samples are known."""

    def __init__(self, x: Tensor, error: Tensor) -> None:
        self._sample = x, error

    def count(self, group: LinearGroup) -> int:
        return len(self._sample[0])

    def products(self, groups: Sequence[LinearGroup]) -> list[tuple[Tensor, Tensor]]:
        x, error = (values.double() for values in self._sample)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        return [(x.T @ x, error.T @ x)] * len(groups)


def test_a_transposed_layer_is_refitted_as_one_that_is_stored_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x, error = (torch.randn(shape, generator=generator) for shape in ((5, 8), (5,), (60, 8), (60, 5)))
    changes = []
    for layer, stored in ((nn.Linear(8, 5), weight), (Conv1D(5, 8), weight.T)):
        model = nn.ModuleDict({"fc": layer})
        model.load_state_dict({"fc.weight": stored, "fc.bias": bias})
        group = LinearGroup("x", 0, ("fc",), "fc", None, transposed=frozenset({"fc"} if stored is not weight else ()))
        compared: Any = Given(x, error)
        with torch.inference_mode():
            changed = refit_groups([group], [compared], model, lambda module: LayerSettings((1.0,), 0.1))
        assert torch.equal(model.state_dict()["fc.weight"], stored + changed["fc.weight"])
        changes.append(changed)
    plain, transposed = changes
    assert plain["fc.weight"].abs().max() > 0.01
    torch.testing.assert_close(transposed, {**plain, "fc.weight": plain["fc.weight"].T})


def test_a_matrix_that_is_fused_of_kinds_without_nodes_is_no_table() -> None:
    with pytest.raises(ValueError, match=r"bert: mixed is fused of kinds whose rows no nodes own"):
        replace(BERT, layer_modules={"mixed": Fused((Kind.QUERY, Kind.DOWN))})
