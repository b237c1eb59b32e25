"""What configurations say of single layers, when layers are put together anew."""

from pathlib import Path
from typing import Any

import pytest

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.layer_settings import keys_of_layers, stacked_config
from worker.engine.catalog.primitives.errors import EngineError


def info(config: dict[str, Any], name: str = "a") -> CheckpointInfo:
    return CheckpointInfo(f"local:{name}", Path(), {"num_hidden_layers": 6, **config}, {}, {}, Path())


def stacked(config: dict[str, Any], *runs: tuple[int, int]) -> dict[str, Any]:
    sources = [(0, number) for start, stop in runs for number in range(start, stop)]
    found = stacked_config(info(config), sources, [info(config)])
    assert found.pop("num_hidden_layers") == len(sources)
    return found


KINDS = ["full", "sliding", "sliding", "full", "sliding", "sliding"]
STACKED = ["sliding", "sliding", "full", "sliding", "sliding", "full"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_types": KINDS}, {"layer_types": STACKED}),
        ({"layers_block_type": KINDS}, {"layers_block_type": STACKED}),
        ({"no_rope_layers": [1, 1, 0, 1, 1, 0]}, {"no_rope_layers": [1, 0, 1, 1, 0, 1]}),
        ({"intermediate_size": [1, 2, 3, 4, 5, 6]}, {"intermediate_size": [2, 3, 4, 2, 3, 4]}),
        ({"hybrid_override_pattern": "MEM*E-"}, {"hybrid_override_pattern": "EM*EM*"}),
        ({"block_types": ["recurrent", "attention"]},
         {"block_types": ["attention", "recurrent", "attention"] * 2}),
        ({"attn_layer_indices": [2]}, {"attn_layer_indices": [1, 4]}),
        ({"mlp_only_layers": []}, {"mlp_only_layers": []}),
        ({"full_attn_idxs": [0, 3]}, {"full_attn_idxs": [2, 5]}),
        ({"attention_types": [[["global", "local"], 3]]},
         {"attention_types": [[["local", "global", "local", "local", "global", "local"], 1]]}),
        ({"first_k_dense_replace": 1}, {"first_k_dense_replace": 0}),
        ({"max_window_layers": 6, "layer_types": KINDS},
         {"max_window_layers": 6, "layer_types": STACKED}),
        ({"full_attention_interval": 3}, {"full_attention_interval": 3}),
        ({"sliding_window_pattern": 5, "layer_types": KINDS},
         {"sliding_window_pattern": 5, "layer_types": STACKED}),
        ({"eos_token_id": [1, 2, 3, 4, 5, 6], "hidden_act": "silu"},
         {"eos_token_id": [1, 2, 3, 4, 5, 6], "hidden_act": "silu"}),
    ],
)  # fmt: skip
def test_settings_follow_their_layers(config: dict[str, Any], expected: dict[str, Any]) -> None:
    """Layers 1, 2, 3, 1, 2, 3; of a rule of three, they keep their places but for the first."""
    if "full_attention_interval" in config:
        assert stacked(config, (0, 3), (0, 3)) == expected
    else:
        assert stacked(config, (1, 4), (1, 4)) == expected


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"first_k_dense_replace": 2}, ["first_k_dense_replace", "such layers after others"]),
        ({"full_attention_interval": 4}, ["full_attention_interval", "layer 1 would become layer 0", "multiples of 4"]),
        ({"model_type": "gemma2"}, ["model_type gemma2", "multiples of 2"]),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, ["attn_layer_period"]),
        ({"odd": [1, 2, 3, 4, 5, 6]}, ["odd in config.json has as many entries as there are layers"]),
        ({"some_layers": [1, 4]}, ["some_layers in config.json may have numbers of layers"]),
        ({"per_layer_config": {"3": {"head_dim": 8}}}, ["per_layer_config", "single layers"]),
        ({"num_kv_shared_layers": 2}, ["num_kv_shared_layers"]),
        ({"hybrid_layer_ids": [1, 3, 5]}, ["hybrid_layer_ids", "share tensors"]),
        ({"attention_types": [[["global"], 2]]}, ["attention_types", "6 layers"]),
    ],
)  # fmt: skip
def test_what_cannot_be_put_together_is_refused_by_name(config: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(EngineError) as refused:
        stacked(config, (1, 4), (1, 4))
    assert all(word in refused.value.message for word in says), refused.value.message


def test_models_say_it_of_their_own_layers() -> None:
    ours, theirs = (
        {"layer_types": KINDS, "attn_layer_indices": [0]},
        {"layer_types": ["x"] * 6, "attn_layer_indices": [4]},
    )
    infos = [info(ours), info(theirs, "b")]
    found = stacked_config(infos[0], [(0, 0), (1, 4), (0, 4)], infos)
    assert (found["layer_types"], found["attn_layer_indices"]) == (["full", "x", "sliding"], [0, 1])
    with pytest.raises(EngineError, match="of the second says nothing of layer 4"):
        stacked_config(infos[0], [(1, 4)], [infos[0], info({}, "b")])


def test_all_layers_in_their_order_change_nothing() -> None:
    config = {"odd": [1, 2, 3, 4, 5, 6], "model_type": "gemma2", "num_kv_shared_layers": 2}
    assert stacked(config, (0, 6)) == config
    assert {"num_hidden_layers", "layer_types", "hybrid_layer_ids"} <= {
        *keys_of_layers(info({"layer_types": KINDS, "hybrid_layer_ids": [1]}).config)
    }
