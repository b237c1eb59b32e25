"""Kinds of mask node as data: what a table says of grouped heads, gates and norms, and what follows from it."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.score_names import named
from worker.engine.catalog import families
from worker.engine.catalog.families import FAMILIES, HEADS, KV_HEADS, NEURONS, NODE_KINDS, Family, Kind, ScoreName, Site
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.table import GROUPED_QUERY, MULTI_HEAD, Norms
from worker.engine.models.mask_gradients import MaskGradients

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 6, "hidden_size": 24, "intermediate_size": 20}
GROUPED = replace(
    BERT,
    layer_modules={**BERT.layer_modules, "gate.dense": Kind.GATE},
    config_names={**BERT.config_names, "kv_heads": "num_key_value_heads", "head_size": "head_dim"},
    ownership=GROUPED_QUERY,
    norms=Norms.BEFORE_BLOCKS,
)


def test_a_name_is_its_text_and_knows_its_layer_and_kind() -> None:
    name = ScoreName(3, KV_HEADS)
    assert (name, name.layer, name.kind) == ("layers.3.kv_heads", 3, KV_HEADS)
    copied = deepcopy(name)
    assert (copied, copied.layer, copied.kind) == (name, 3, KV_HEADS)
    assert [kind.name for kind in NODE_KINDS.values()] == list(NODE_KINDS)


def test_kinds_of_node_are_those_that_own_something() -> None:
    assert MULTI_HEAD.kinds == (HEADS, NEURONS)
    assert GROUPED_QUERY.kinds == (HEADS, KV_HEADS, NEURONS)
    assert KV_HEADS.groups == HEADS


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("attention.self.query", ("layers.1.heads", 0)),
        ("attention.self.key", ("layers.1.kv_heads", 0)),
        ("attention.self.value", ("layers.1.kv_heads", 0)),
        ("attention.output.dense", ("layers.1.heads", 1)),
        ("gate.dense", ("layers.1.neurons", 0)),
        ("intermediate.dense", ("layers.1.neurons", 0)),
        ("output.dense", ("layers.1.neurons", 1)),
        ("output.LayerNorm", None),
    ],
)
def test_grouped_heads_and_gates_own_what_the_table_says(module: str, owner: tuple[str, int] | None) -> None:
    slot = GROUPED.slot(f"bert.encoder.layer.1.{module}.weight")
    assert slot is not None
    assert (slot.owner and (*slot.owner.scores, slot.owner.axis)) == owner


@pytest.mark.parametrize(
    ("family", "more", "rows"),
    [
        (BERT, {}, {"heads": 24, "neurons": 20}),
        (GROUPED, {}, {"heads": 24, "kv_heads": 24, "neurons": 20}),
        (GROUPED, {"num_key_value_heads": 2, "head_dim": None}, {"heads": 24, "kv_heads": 8, "neurons": 20}),
        (GROUPED, {"num_key_value_heads": 3, "head_dim": 8}, {"heads": 48, "kv_heads": 24, "neurons": 20}),
    ],
)
def test_what_nodes_own_together_follows_from_the_configuration(
    family: Family, more: dict[str, int | None], rows: dict[str, int]
) -> None:
    config = {**CONFIG, **more}
    assert {kind.name: family.owned(config, kind) for kind in family.ownership.kinds} == rows
    sites = list(family.sites(config))
    assert [site.module.rpartition("layer.")[2] for site in sites[:2]] == ["0.attention.output.dense", "0.output.dense"]
    counts = {kind.name: family.size(config, kind.count) for kind in family.ownership.kinds}
    found = {score: count for site in sites for score, count in site.counts.items()}
    assert found == {f"layers.{layer}.{kind}": count for layer in range(2) for kind, count in counts.items()}


def test_a_gate_shares_the_input_that_is_seen_at_up() -> None:
    gate, up = (GROUPED.slot(f"bert.encoder.layer.0.{name}.dense.weight") for name in ("gate", "intermediate"))
    assert gate is not None
    assert up is not None
    assert gate.input == up.input == "layers.0.feed_forward"
    assert (gate.shows_input, up.shows_input) == (False, True)


def test_sums_of_residuals_are_read_by_the_norm_that_comes_next() -> None:
    after = {Kind.ATTENTION_OUTPUT: Kind.ATTENTION_NORM, Kind.DOWN: Kind.FEED_FORWARD_NORM}
    assert BERT.residual_norms({}) == after
    assert GROUPED.residual_norms({}) == {Kind.ATTENTION_OUTPUT: Kind.FEED_FORWARD_NORM, Kind.DOWN: None}
    assert replace(GROUPED, norms=Norms.AFTER_BLOCKS).residual_norms({}) == {}  # what is added is no layer's output


def test_a_setting_may_say_where_norms_are() -> None:
    where = {"new": (True, Norms.PARALLEL), "last": (True, Norms.AFTER_SUMS)}
    family = replace(GROUPED, norms_where=where, settings={"new": False, "last": False})
    assert [family.norms_in(config) for config in ({}, {"last": True}, {"new": True, "last": True})] == [
        Norms.BEFORE_BLOCKS, Norms.AFTER_SUMS, Norms.PARALLEL,
    ]  # fmt: skip
    assert family.residual_norms({"new": True}) == {Kind.DOWN: None}


def test_neurons_may_follow_from_the_hidden_size() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": None}
    assert replace(GROUPED, widening=4).size(sizes, "neurons") == 96
    with pytest.raises(ValueError, match="intermediate_size"):
        GROUPED.size(sizes, "neurons")


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, 131072),
        ({"rope_parameters": {"rope_type": "default", "original_max_position_embeddings": 9}}, 131072),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 9}}, 9),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096}, 4096),
    ],
)
def test_rows_are_no_longer_than_what_makes_rotary_positions_depend_on_the_batch(
    config: dict[str, object], tokens: int
) -> None:
    assert GROUPED.max_tokens({"max_position_embeddings": 131072, **config}) == tokens


def test_tensors_that_are_not_read_may_be_in_every_layer() -> None:
    family = replace(GROUPED, unread=("encoder.layer.{layer}.attention.bias", "inv.freq"))
    found = {name: family.slot(f"bert.{name}") for name in ("encoder.layer.11.attention.bias", "inv.freq")}
    assert {slot and slot.kind for slot in found.values()} == {Kind.UNREAD}
    for name in ("encoder.layer.x.attention.bias", "inv_freq", "encoder.layer.1.attention.biases"):
        assert family.slot(f"bert.{name}") is None
    assert replace(GROUPED, unread=()).slot("bert.inv.freq") is None


def test_a_size_that_a_configuration_lacks_is_the_library_s() -> None:
    sizes = {"num_attention_heads": 6, "hidden_size": 24}
    assert (GROUPED.size(sizes, "kv_heads"), GROUPED.size(sizes, "head_size")) == (6, 4)
    with_own = replace(GROUPED, absent_sizes={"kv_heads": 2, "head_size": 9})
    assert (with_own.size(sizes, "kv_heads"), with_own.size(sizes, "head_size")) == (2, 9)
    told = {**sizes, "num_key_value_heads": None, "head_dim": 8}
    assert (with_own.size(told, "kv_heads"), with_own.size(told, "head_size")) == (6, 8)


def test_the_gradient_of_what_heads_share_is_the_sum_of_theirs() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    heads, shared = named("layers.0.heads"), named("layers.0.kv_heads")
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with MaskGradients(network, [Site("2", {heads: 6, shared: 2})]) as gradients:
        found = gradients.of(network(x).sum((1, 2)), last=True)
    masks = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
    activation = torch.tanh(network[0](x)) * masks.repeat_interleave(6, 1)[:, None]
    [wanted] = torch.autograd.grad(network[2](activation).sum(), masks)
    torch.testing.assert_close(found[shared], wanted)
    torch.testing.assert_close(found[shared], found[heads].view(5, 2, 3).sum(-1))


def test_a_family_is_found_by_its_file_and_two_of_one_model_type_are_refused() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__", "head", "nodes", "table"}
    assert {family.model_type.replace("-", "_") for family in FAMILIES.values()} == files
    assert families._by_model_type([BERT, BERT]) == {"bert": BERT}
    with pytest.raises(ImportError, match="two families have the model type bert"):
        families._by_model_type([BERT, GROUPED])
