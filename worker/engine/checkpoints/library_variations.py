"""Varies configurations of transformers' models, for the table that `library_table` writes.

What a class needs and what it refuses depends on its configuration in ways that only its code tells. So models are
built from many configurations that differ from one in few keys. It is known of each only whether it could be built.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.initialization import no_init_weights

from worker.engine.catalog.checkpoints.config_differences import HARMLESS, is_of_training
from worker.engine.catalog.checkpoints.library import LAYER_KEYS

Config = dict[str, Any]
Path = tuple[str, ...]
"""A key of a configuration, or the keys of an inner configuration and of a value in it."""
Changes = Mapping[Path, Any]

FEW_LAYERS = 2
DEFAULT_LABELS = 2
KIND_KEYS = (
    "attn_layer", "hybrid", "pattern", "_period", "_offset", "sparse_step",
    "first_k_dense", "mlp_only", "moe_layer", "cross_attention_layers", "full_attn_idxs", "dense_layers",
    "lorb", "kv_source", "kv_shared", "per_layer", "interleave", "every",
)  # fmt: skip
"""Parts of names of keys that may give layers different tensors."""
DERIVED_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "transformers_version")
"""Keys that follow from the number of layers."""
WORDS: Mapping[str, tuple[str, ...]] = {
    "feed_forward_proj": ("gated-gelu", "relu", "gated-silu", "gated-relu", "gelu", "silu"),
    "ffn_type": ("gated-gelu",),
}  # fmt: skip
"""Settings in words that change the set of tensors."""
BLOCKS = (
    "attention",
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "mamba",
    "conv",
    "hybrid",
    "recurrent",
)
LAYER_WORDS: Mapping[str, tuple[str, ...]] = {
    "layer_types": (*BLOCKS, "chunked_attention", "moe", "mlp"),
    "layers_block_type": (*BLOCKS, "recurrent", "moe", "mlp"),
    "mlp_layer_types": ("dense", "sparse"),
}
"""Keys of lists over layers, each with the kinds of layers that it may name."""
SHOWN = frozenset({"head_dim", "n_inner", "n_ctx"})
"""Keys that may differ between checkpoints, because shapes show them."""
PARTS_OF_WIDTHS = ("head", "group")
"""Parts of names of keys that must divide a width."""
PRIMES = (7, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class Trial:
    """What can be built near one configuration: models of a class, or the configuration alone."""

    config: Config
    """The whole configuration that nothing is changed of."""
    build: Callable[[Changes], Any]
    """Builds with some changes; returns None where transformers refuses."""
    switches: Changes | None = None
    """Other values of switches that may be changed together, if they are known from a similar trial."""

    def takes(self, changes: Changes) -> bool:
        return self.build(changes) is not None

    @cached_property
    def paths(self) -> list[Path]:
        """All keys, including those of inner configurations."""
        found: list[Path] = []
        for key, value in self.config.items():
            if isinstance(value, dict) and "model_type" in value:
                found += [(key, inner) for inner in value]
            found.append((key,))
        return found

    @cached_property
    def turned(self) -> Changes:
        """Another value for as many switches as can be changed together; a switch is true, false, null or a word."""
        if (
            self.switches is not None
            and all(path in self.paths for path in self.switches)
            and self.takes(self.switches)
        ):
            return self.switches
        found: dict[Path, Any] = {}
        for path in self.paths:
            value = self.at(path)
            if isinstance(value, bool) or value is None or path[-1] in WORDS:
                for other in variations(path[-1], value)[:1]:
                    if other != value and self.takes({**found, path: other}):
                        found[path] = other
        return found

    def at(self, path: Path) -> Any:
        value: Any = self.config
        for key in path:
            value = value[key]
        return value

    def non_divisor(self) -> int:
        """Return a prime that divides none of the configuration's numbers."""
        numbers = [value for path in self.paths if type(value := self.at(path)) is int and value > 1]
        return next((prime for prime in PRIMES if all(number % prime for number in numbers)), PRIMES[-1])


def trial_of_model(
    model_class: Any, config_class: Any, settings: Config, config: Config, switches: Changes | None
) -> Trial:
    """Return the trial of a class's models near the ones of these settings."""
    return Trial(config, lambda changes: built(model_class, config_class, changed(settings, config, changes)), switches)


def trial_of_config(config_class: Any, defaults: Config) -> Trial:
    """Return the trial of configurations near the default one."""

    def build(changes: Changes) -> Any:
        try:
            return config_class(**changed({}, defaults, changes))
        except Exception:
            return None

    # Inner configurations are kinds of their own.
    own = {key: one for key, one in defaults.items() if key != "model_type" and not isinstance(one, dict)}
    return Trial({**own, **{key: one for key, one in defaults.items() if key == "rope_parameters"}}, build)


def built(model_class: Any, config_class: Any, settings: Config) -> Any:
    """Build the model without memory for its weights; None where there is no such model, or it is very large."""
    try:
        with torch.device("meta"), no_init_weights():
            return model_class._from_config(config_class(**settings), attn_implementation="eager")
    except Exception:
        return None


def plain(config: Any) -> Config:
    """Return the whole configuration as `save_pretrained` would write it."""
    return dict(json.loads(json.dumps(type(config)._encode_special_floats(config.to_dict()), default=str)))


def few_layers(config_class: Any, defaults: Config) -> Config:
    """Return settings for a model with as few layers as possible, but two, so that they can differ."""
    settings: Config = {}
    if "attention_types" in defaults:  # of GPT-Neo, has kinds of layers and how often they return
        settings = {"num_layers": FEW_LAYERS, "attention_types": [[["global", "local"], FEW_LAYERS // 2]]}
    for key, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            fewer = {inner: FEW_LAYERS for inner in LAYER_KEYS if type(value.get(inner)) is int}
            other: Any = {**{inner: one for inner, one in value.items() if inner not in DERIVED_LISTS}, **fewer}
        elif key in LAYER_KEYS and key not in settings and type(value) is int and value > FEW_LAYERS:
            other = FEW_LAYERS
        else:
            continue
        try:
            config_class(**{**settings, key: other})
        except Exception:  # noqa: S112 - there is no such model
            continue
        settings[key] = other
    return settings


def changed(settings: Config, config: Config, changes: Changes) -> Config:
    """Return settings with changes, of which classes may change copies.

    An inner configuration with a change is given as a whole, but for lists that follow from a changed number of layers.
    """
    changes = deepcopy({**changes})
    found, inner = dict(settings), dict[str, Config]()
    for path, value in changes.items():
        if len(path) == 1:
            found[path[0]] = value
        else:
            whole = {key: one for key, one in config[path[0]].items() if key != "transformers_version"}
            inner.setdefault(path[0], whole)[path[1]] = value
            if path[1] in LAYER_KEYS:
                inner[path[0]] = {key: one for key, one in inner[path[0]].items() if key not in DERIVED_LISTS}
    return found | inner


def is_list_of(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def variations(key: str, value: Any) -> list[Any]:
    """Return other values of a key, for a model that is otherwise the same."""
    if key in HARMLESS - SHOWN or is_of_training(key) or key.endswith("_token_id"):
        return []
    if key in WORDS:
        return list(WORDS[key])
    if key in LAYER_WORDS and isinstance(value, list):
        return [[word] * len(value) for word in LAYER_WORDS[key]]
    if isinstance(value, bool):
        return [not value]
    if type(value) is int:
        if value <= 0:
            return [2, 1]
        return [value * 2] if key in LAYER_KEYS else [value * 2, 0]
    return [8] if value is None else []


def variations_of_models(trial: Trial) -> Iterator[tuple[Path, Any]]:
    """Yield keys, each with another value, for models that may have other tensors."""
    for path in trial.paths:
        key, value = path[-1], trial.at(path)
        found = variations(key, value)
        if type(value) is int and value > 1 and any(part in key for part in PARTS_OF_WIDTHS):
            found.append(trial.non_divisor())
        if type(value) is int and any(part in key for part in KIND_KEYS):
            found += [1, 2]  # of two layers, either one is of the kind or both are
        if isinstance(value, list) and key not in LAYER_WORDS:
            if value and all(type(one) is int and one > 0 for one in value):
                found.append([2 * one for one in value])
            if any(part in key for part in KIND_KEYS):
                found += [[], [0], [1], [0, 1]]
        yield from ((path, other) for other in found if other != value)
    if "num_labels" not in trial.config:
        yield ("num_labels",), DEFAULT_LABELS + 1
        yield ("num_labels",), 1
