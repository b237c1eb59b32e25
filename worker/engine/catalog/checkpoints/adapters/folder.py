"""Reads an adapter's folder from its headers: the factors of each module, and tensors that are stored whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from worker.engine.catalog.checkpoints.adapters.config import AdapterConfig, read_config
from worker.engine.catalog.checkpoints.adapters.peft import (
    EMBEDDING,
    FACTORS,
    MAY_BE_EMBEDDING,
    MERGE_IT,
    PREFIX,
    WRAPPERS,
)
from worker.engine.catalog.checkpoints.adapters.targets import Targets
from worker.engine.catalog.checkpoints.files import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, INDEX, WEIGHTS
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import FLOATS, TensorInfo
from worker.engine.catalog.primitives.errors import InvalidCheckpoint


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration, its factors by module, and its whole tensors by name."""

    source: str
    config: AdapterConfig
    factors: Mapping[str, Mapping[str, TensorInfo]]
    embeddings: frozenset[str]
    """Modules among `factors` that are embeddings."""
    whole: Mapping[str, TensorInfo]


def read_adapter(path: Path, source: str) -> Adapter:
    """Read an adapter's configuration and the header of its weights.

    Raises:
        InvalidCheckpoint: the folder holds no plain LoRA adapter, or one of which PEFT would leave out a part.
    """
    config = read_config(path, source)
    _check_files(path, source)
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    copies: dict[str, TensorInfo] = {}
    embeddings = set()
    for tensor in read_header(path / ADAPTER_WEIGHTS, source):
        if not tensor.name.startswith(PREFIX):
            raise InvalidCheckpoint(source, f"tensor {tensor.name} has no name of PEFT's, which begin with {PREFIX}")
        if tensor.dtype not in FLOATS:
            raise InvalidCheckpoint(source, f"tensor {tensor.name} has dtype {tensor.dtype}, not a float")
        if ".original_module." in tensor.name:  # modules_to_save replaces these; PEFT saves them too if it saves biases
            continue
        name = WRAPPERS.sub("", tensor.name.removeprefix(PREFIX))
        if ".modules_to_save." in tensor.name:  # PEFT, too, reads it under its name without that part
            copies[name] = tensor
            continue
        end = next((end for end in FACTORS if name.endswith(f".{end}")), None)
        if end is not None:
            module = name.removesuffix(f".{end}")
            factor, is_embedding = FACTORS[end]
            if factors.setdefault(module, {}).setdefault(factor, tensor) is not tensor:
                problem = f"tensors {factors[module][factor].name} and {tensor.name} are both of {module}"
                raise InvalidCheckpoint(source, f"{problem}; save it again")
            if is_embedding:
                embeddings.add(module)
        elif ".lora_" in name:
            raise InvalidCheckpoint(source, f"tensor {tensor.name} is of no plain LoRA adapter; {MERGE_IT}")
        else:
            whole[name] = tensor
    if not factors and not whole:
        raise InvalidCheckpoint(source, f"{ADAPTER_WEIGHTS} has no tensor of an adapter; save it again")
    for module, pair in factors.items():
        if len(pair) < 2:
            raise InvalidCheckpoint(source, f"of {module}, only one of the tensors lora_A and lora_B is there")
        if (pair["a"].name.endswith("lora_embedding_A")) is not pair["b"].name.endswith("lora_embedding_B"):
            raise _left_out(source, pair["a"], f"tensor {pair['b'].name} is of another kind of layer")
    adapter = Adapter(source, config, factors, frozenset(embeddings), whole)
    _refuse_left_out(adapter, copies)
    return adapter


def _check_files(path: Path, source: str) -> None:
    """Raise InvalidCheckpoint unless the adapter's weights are there, in the right format, and no other model's."""
    if not (path / ADAPTER_WEIGHTS).is_file():
        if (path / ADAPTER_PICKLE).exists():
            problem = (
                f"{ADAPTER_PICKLE} is there but no {ADAPTER_WEIGHTS}; pickle files are not opened. Convert it where "
                'you trust it: python -c "import torch; from safetensors.torch import save_file; '
                f"save_file({{k: v.contiguous() for k, v in torch.load('{ADAPTER_PICKLE}').items()}}, "
                f"'{ADAPTER_WEIGHTS}')\""
            )
            raise InvalidCheckpoint(source, problem)
        raise InvalidCheckpoint(source, f"{ADAPTER_WEIGHTS} is missing")
    for name in (WEIGHTS, INDEX):
        if (path / name).exists():
            raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG} and {name} are both there; leave the one that is meant")


def _refuse_left_out(adapter: Adapter, copies: Mapping[str, TensorInfo]) -> None:
    """Raise InvalidCheckpoint where PEFT would leave a tensor out without a word, and so make another model."""
    for name, tensor in copies.items():
        if name not in adapter.whole:
            problem = f"PEFT reads {PREFIX}{name} in its place, which is missing"
            raise _left_out(adapter.source, tensor, problem)
    for name, tensor in adapter.whole.items():
        module, is_wrapped = name.rpartition(".")[0], ".base_layer." in tensor.name
        if is_wrapped is not (module in adapter.factors):
            problem = f"{module} has {'no' if is_wrapped else ''} matrices of its own, so that PEFT expects the name "
            expected = f"{PREFIX}{name}" if is_wrapped else f"{PREFIX}{module}.base_layer.{name.rpartition('.')[2]}"
            raise _left_out(adapter.source, tensor, f"{problem}{expected}")
    if not adapter.factors:
        return
    try:
        targets = Targets(adapter.config)
        for module, pair in adapter.factors.items():
            is_embedding, last = module in adapter.embeddings, module.rpartition(".")[2]
            key = targets.left_out_by(module, is_embedding)
            if key is not None:
                raise _left_out(adapter.source, pair["a"], f"{ADAPTER_CONFIG}: {key} leaves out {module}")
            if is_embedding and MAY_BE_EMBEDDING.search(last) is None:
                raise _left_out(adapter.source, pair["a"], "its name is of an embedding, and the module's of none")
            if not is_embedding and EMBEDDING.fullmatch(last):
                problem = "of an embedding PEFT reads lora_embedding_A and lora_embedding_B"
                raise _left_out(adapter.source, pair["a"], problem)
    except ValueError as error:
        raise InvalidCheckpoint(adapter.source, f"{ADAPTER_CONFIG}: {error}; {MERGE_IT}") from error


def _left_out(source: str, tensor: TensorInfo, problem: str) -> InvalidCheckpoint:
    problem = f"{ADAPTER_WEIGHTS}: tensor {tensor.name} would not count in PEFT: {problem}"
    return InvalidCheckpoint(source, f"{problem}; correct that, or leave the tensor out", tensor=tensor.name)
