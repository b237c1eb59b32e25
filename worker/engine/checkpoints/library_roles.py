"""Finds by one model what a class's tensors are for, for the table that `library_table` writes.

Where a model runs without memory for weights, the order in which it calls its modules tells which tensors come before
its layers. Many models need inputs of their own, or look at values; of these the names have to tell.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.catalog.checkpoints.library import collapsed
from worker.engine.catalog.checkpoints.tensor_names import is_before_layers, layer_of
from worker.engine.checkpoints.library_variations import Config

TOKENS = 8
SAMPLES = 16_000
FRAMES = 3_000


def roles_of(model: Any, names: Iterable[str]) -> Config:
    """Return `embedding`, `output`, `before` and `computed` of the table, see `library.Architecture`.

    Args:
        names: the class's tensors, some of which this model may lack.
    """
    outer = [name for name in names if layer_of(name) is None and "{}" not in name]
    told = places_of(model)
    saved = model.state_dict()
    return {
        "embedding": weight_of(model, model.get_input_embeddings),
        "output": weight_of(model, model.get_output_embeddings),
        "before": sorted(name for name in outer if told.get(name, is_before_layers(name))),
        "computed": sorted({collapsed(name) for name, _ in model.named_buffers() if name not in saved}),
    }


def weight_of(model: nn.Module, get: Any) -> str | None:
    """Return the name of the matrix of the module that `get` returns; None where it has none."""
    try:
        found = get()
    except Exception:  # models of several parts have none of their own
        return None
    names = (name for name, one in model.named_modules() if one is found and isinstance(found, nn.Module))
    return next((f"{name}.weight" for name in names if isinstance(getattr(found, "weight", None), nn.Parameter)), None)


def places_of(model: nn.Module) -> dict[str, bool]:
    """Return for tensors outside the layers whether their modules are called before the layers of their part.

    The layers of a tensor's part are those whose names begin with most of the tensor's own. Nothing is said of a module
    that is not called, or that holds the layers.
    """
    order = calls_of(model)
    starts: dict[str, int] = {}
    for name, place in order.items():
        layer = layer_of(name)
        if layer is not None:
            starts[layer.stack] = min(place, starts.get(layer.stack, place))
    found = {}
    for name, place in order.items() if starts else ():
        module = name.rpartition(".")[0]
        if layer_of(name) is None and module and not any(stack.startswith(f"{module}.") for stack in starts):
            longest = max(shared(name, stack) for stack in starts)
            found[name] = place < min(start for stack, start in starts.items() if shared(name, stack) == longest)
    return found


def shared(name: str, other: str) -> int:
    """Return with how many equal words two names begin."""
    pairs = list(zip(name.split("."), other.split("."), strict=False))
    return next((count for count, (one, two) in enumerate(pairs) if one != two), len(pairs))


def calls_of(model: nn.Module) -> dict[str, int]:
    """Return the tensors of modules that a run calls, each with the place of the first call; empty if none runs.

    A run that stops in the layers tells enough.
    """
    names = {
        module: [f"{name}.{own}" if name else own for own, _ in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
    }
    called: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any) -> None:
        called.setdefault(module, len(called))

    hooks = [module.register_forward_pre_hook(note) for module, own in names.items() if own]
    best: dict[str, int] = {}
    model.eval()
    for inputs in inputs_of(model):
        called.clear()
        try:
            with torch.device("meta"), torch.no_grad():
                model(**inputs)
        except Exception:  # noqa: S110 - other inputs are tried
            pass
        found = {name: place for module, place in called.items() for name in names[module]}
        best = max(best, found, key=len)
    for hook in hooks:
        hook.remove()
    return best


def inputs_of(model: Any) -> Iterator[Mapping[str, Tensor]]:
    """Yield inputs that models of different kinds take."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    config = model.config
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", 224), getattr(vision, "num_channels", 3)
    size = size if isinstance(size, int) else 224
    bins = getattr(config, "num_mel_bins", 80)
    of_kind = {
        "pixel_values": torch.zeros(1, channels if isinstance(channels, int) else 3, size, size, device="meta"),
        "input_values": torch.zeros(1, SAMPLES, device="meta"),
        "input_features": torch.zeros(1, bins if isinstance(bins, int) else 80, FRAMES, device="meta"),
    }
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    yield {"input_ids": ids}
    yield {"input_ids": ids.expand(1, 2, TOKENS)}  # two choices
    for name, value in of_kind.items():
        yield {name: value, **decoder}
    yield {"input_ids": ids, "pixel_values": of_kind["pixel_values"]}
