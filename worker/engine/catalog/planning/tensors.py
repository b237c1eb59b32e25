"""Plans one output tensor of a merge from the tensors of every checkpoint and of the base."""

from collections.abc import Mapping, Sequence

from worker.engine.catalog.checkpoints.info import FLOATS, CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.token_tensors import check_rows, is_token_indexed, vocabulary_size
from worker.engine.catalog.checkpoints.vocabulary import Vocabulary
from worker.engine.catalog.contracts.spec import Dtype
from worker.engine.catalog.families import Slot
from worker.engine.catalog.planning.plan import PlannedTensor
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.primitives.values import TensorPlace

TORCH_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def merged_tensor(
    slot: Slot,
    place: TensorPlace,
    checkpoints: Sequence[CheckpointInfo],
    named: Sequence[Mapping[str, TensorInfo]],
    name: str,
    origin: tuple[CheckpointInfo, TensorInfo | None] | None,
    dtype: Dtype,
    vocabulary: Vocabulary | None,
) -> PlannedTensor:
    """Plan the tensor `name` from every checkpoint's, with the base's.

    Args:
        named: tensors of each checkpoint, by name.
        origin: the base, and the tensor in it.
    """
    tensor = named[0][name]
    shape, rows = tensor.shape, None
    of_first = vocabulary_size(checkpoints[0].config)
    if vocabulary is not None and of_first is not None and is_token_indexed(name, shape, of_first):
        shape, rows = (vocabulary.rows, *shape[1:]), vocabulary.token_rows
    by_token = rows is not None
    sources = _sources(checkpoints, named, name, by_token)
    if by_token:
        for info, source in zip(checkpoints, sources, strict=True):
            check_rows(info, source)
    if origin is None:
        return PlannedTensor(slot, place, shape, output_dtype(sources, dtype), tuple(sources), token_rows=rows)
    base, found = origin
    _check_base(base, found, checkpoints[0], tensor, by_token)
    if by_token and found is not None:
        check_rows(base, found)
    return PlannedTensor(slot, place, shape, output_dtype(sources, dtype), tuple(sources), found, token_rows=rows)


def output_dtype(sources: Sequence[TensorInfo], dtype: Dtype) -> str:
    """Return the asked dtype; for `auto` the inputs' own, and float32 where they disagree (float64 if one has it)."""
    if dtype != "auto":
        return TORCH_NAMES[dtype]
    found = {source.dtype for source in sources}
    if len(found) == 1:
        return found.pop()
    return "F64" if "F64" in found else "F32"


def _sources(
    checkpoints: Sequence[CheckpointInfo], named: Sequence[Mapping[str, TensorInfo]], name: str, by_token: bool
) -> list[TensorInfo]:
    """Return each checkpoint's tensor. Raises IncompatibleCheckpoints where one has none, or one of another shape."""
    first, tensor = checkpoints[0], named[0][name]
    for info, tensors in zip(checkpoints, named, strict=True):
        if name not in tensors:
            raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is missing in the second")
        check_shape(first, tensor, info, tensors[name], by_token)
        if tensors[name].dtype not in FLOATS:
            raise InvalidCheckpoint(info.source, f"tensor {name} has dtype {tensors[name].dtype}, not a float")
    return [tensors[name] for tensors in named]


def _check_base(
    base: CheckpointInfo, found: TensorInfo | None, first: CheckpointInfo, tensor: TensorInfo, by_token: bool
) -> None:
    if found is None:
        raise IncompatibleCheckpoints(first.source, base.source, f"tensor {tensor.name} is missing in the base")
    if found.shape[by_token:] != tensor.shape[by_token:]:
        raise IncompatibleCheckpoints(
            first.source,
            base.source,
            f"tensor {tensor.name} has shape {list(tensor.shape)}, in the base {list(found.shape)}",
        )
    if found.dtype not in FLOATS:
        raise InvalidCheckpoint(base.source, f"tensor {found.name} has dtype {found.dtype}, not a float")


def check_shape(
    first: CheckpointInfo, tensor: TensorInfo, info: CheckpointInfo, found: TensorInfo, by_token: bool = False
) -> None:
    """Raise IncompatibleCheckpoints where a tensor has another shape in `info` than in `first`.

    Args:
        by_token: whether it has a row for each token, so that the number of rows does not count.
    """
    if found.shape[by_token:] != tensor.shape[by_token:]:
        raise IncompatibleCheckpoints(
            first.source,
            info.source,
            f"tensor {tensor.name} has shape {list(tensor.shape)} in the first, {list(found.shape)} in the second",
        )
