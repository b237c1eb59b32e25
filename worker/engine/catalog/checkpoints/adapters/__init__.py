"""Reads LoRA adapters, as PEFT saves them, from their headers, as the whole checkpoints that they make of their base.

Every adapted matrix is `W_base + scaling * B A` with `scaling = alpha / r`, or, rank-stabilised, `alpha / sqrt(r)`
(https://arxiv.org/abs/2106.09685 and https://arxiv.org/abs/2312.03732). Tensors that PEFT stores whole
(`modules_to_save`, trained biases) replace the base's.
"""

from pathlib import Path

from worker.engine.catalog.checkpoints.adapters.adapted import adapted
from worker.engine.catalog.checkpoints.adapters.folder import read_adapter
from worker.engine.catalog.checkpoints.descriptions import check_folder
from worker.engine.catalog.checkpoints.files import ADAPTER_CONFIG
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint, readable
from worker.engine.catalog.primitives.errors import InvalidCheckpoint


def inspect_model(
    path: Path,
    source: str,
    base: CheckpointInfo | None,
    *,
    without_base: str = "name that as base",
) -> CheckpointInfo:
    """Read the headers of a checkpoint or of an adapter of `base`, see `inspect_checkpoint`.

    Args:
        without_base: advice in the message for an adapter if there is no base.

    Raises:
        InvalidCheckpoint: a file or tensor is refused; the message names it and says what to do.
        IncompatibleCheckpoints: the adapter does not adapt `base`.
    """
    with readable(source):
        if not (path / ADAPTER_CONFIG).exists():
            return inspect_checkpoint(path, source)
        check_folder(path, source)
        adapter = read_adapter(path, source)
        if base is None:
            of = adapter.config.base_model_name_or_path
            of = of[:200] if of else "a model that it does not name"
            raise InvalidCheckpoint(source, f"it is an adapter of {of}; {without_base}")
        return adapted(adapter, path, base)
