"""Reads headers of statistics that come from files, and finds a model's tensors among them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from worker.engine.catalog.checkpoints.files import INDEX, SAFETENSORS, WEIGHTS
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import FLOATS, TensorInfo
from worker.engine.catalog.checkpoints.inspection import readable, unstacked, weight_files
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.families import Kind
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, InvalidStatistics
from worker.engine.catalog.primitives.strict import did_you_mean

ADAPTER_FACTOR = "lora_"
"""Part of the names of an adapter's factors."""


def given_tensors(
    plan: MergePlan, model: int, views: Views, place: Path, source: str, root: Path
) -> dict[str, TensorInfo]:
    """Return the tensors of a statistic of every merged parameter of a model, by `Slot.name`, from headers alone.

    Args:
        model: the model's position in the plan.
        place: a safetensors file, or a folder with the weight files that a checkpoint has.
        source: reference of the statistic, for messages.
        root: folder in which every file must lie, whatever links lead to it.

    Raises:
        InvalidStatistics: a file cannot be read, or a tensor is missing, has another shape, is no float, or is none of
            the checkpoint; the message names it.
    """
    with _of_statistics(source):
        found = _headers(views, place, source, root)
        return _of_model(plan, model, unstacked(found, plan.checkpoints[model].model_type, source), source)


def _headers(views: Views, place: Path, source: str, root: Path) -> dict[str, TensorInfo]:
    if place.is_dir():
        folder = views.open(place, source, root)
        if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
            raise InvalidStatistics(source, f"neither {WEIGHTS} nor {INDEX} is in the folder")
        names, _ = weight_files(folder, source, {})
        files = [folder / name for name in names]
    elif place.name.endswith(SAFETENSORS):
        files = [views.open_file(place, source, root)]
    else:
        problem = f"by its name it is no {SAFETENSORS} file; others are not opened, since they may be pickles"
        raise InvalidStatistics(source, problem)
    tensors: dict[str, TensorInfo] = {}
    with readable(source):
        for file in files:
            for tensor in read_header(file, source):
                if tensor.name in tensors:
                    raise InvalidStatistics(source, f"tensor {tensor.name} is in two files", tensor=tensor.name)
                tensors[tensor.name] = tensor
    return tensors


def _of_model(plan: MergePlan, model: int, found: Mapping[str, TensorInfo], source: str) -> dict[str, TensorInfo]:
    info, family = plan.checkpoints[model], plan.family

    def canonical(name: str) -> str:
        slot = None if family is None else family.slot(name)
        return name if slot is None else slot.name

    by_slot = {canonical(name): tensor for name, tensor in found.items()}
    if len(by_slot) < len(found):
        raise InvalidStatistics(source, "a tensor is there under two spellings")
    own = {canonical(name) for name in info.tensors}
    merged = [
        (tensor.slot.name, tensor.sources[model])
        for tensor in plan.backbone
        if not tensor.is_copied and tensor.slot.kind is not Kind.HEAD  # heads are merged by the weights alone
    ]
    for name in found:
        if canonical(name) not in own:
            if ADAPTER_FACTOR in name:
                advice = "; statistics are of the matrices that adapters change, as the base names them, not of factors"
            else:
                advice = did_you_mean(name, [tensor.name for _, tensor in merged])
            raise InvalidStatistics(source, f"tensor {name} is none of {info.source}{advice}", tensor=name)
    wanted = {slot: by_slot.get(canonical(tensor.name)) for slot, tensor in merged}
    missing = [tensor.name for slot, tensor in merged if wanted[slot] is None]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"no tensor {missing[0]}{more} of {info.source} is there; a parameter that was not trained has zeros"
        raise InvalidStatistics(source, problem, tensor=missing[0])
    tensors = {slot: tensor for slot, tensor in wanted.items() if tensor is not None}
    for slot, of_model in merged:
        tensor = tensors[slot]
        if tensor.shape != of_model.shape:
            problem = f"tensor {tensor.name} has shape {list(tensor.shape)}, in {info.source} {list(of_model.shape)}"
            raise InvalidStatistics(source, problem, tensor=tensor.name)
        if tensor.dtype not in FLOATS:
            problem = f"tensor {tensor.name} has dtype {tensor.dtype}, not a float"
            raise InvalidStatistics(source, problem, tensor=tensor.name)
    return tensors


@contextmanager
def _of_statistics(source: str) -> Iterator[None]:
    """Turn refusals by readers of checkpoints and data sets into InvalidStatistics."""
    try:
        yield
    except (InvalidCheckpoint, InvalidDataset) as error:
        problem = error.message
        for kind in ("checkpoint", "data set"):
            problem = problem.removeprefix(f"{kind} {source}: ")
        raise InvalidStatistics(source, problem) from error
