"""Opens a job's checkpoints and rows, wherever they come from.

The libraries for tables and for the hub cost 110 MB and half a second, so they are loaded when they are needed. They
come after the libraries that every model needs, because these look for each other.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from worker.engine.catalog.checkpoints.adapters import inspect_model
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.inspection import checkpoint_state
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.contracts.spec import CheckpointSpec, JobSpec
from worker.engine.catalog.data.rows import RowFile, RowReader, Rows, is_parquet
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.given import given_tensors
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.checkpoints.reader import ExpectedFile
from worker.engine.runtime.libraries import preload
from worker.engine.runtime.progress import OnProgress

if TYPE_CHECKING:
    from worker.engine.inputs.hub import Fetched


class Inputs:
    """A job's inputs. Making it downloads those on the hub, see `worker.engine.inputs.hub.fetch`.

    Args:
        views: opens checkpoints, which can be read as long as its context lasts.
    """

    def __init__(self, spec: JobSpec, views: Views, on_progress: OnProgress) -> None:
        self._views = views
        self._fetched: Fetched | None = None
        self.expected: dict[Path, ExpectedFile] = {}
        """The files of opened checkpoints that earlier jobs wrote; their bytes have not been read yet."""
        if spec.names_the_hub:
            preload()
            from worker.engine.inputs.hub import fetch

            self._fetched = fetch(spec, on_progress)

    def checkpoint(self, model: CheckpointSpec, base: CheckpointInfo | None = None) -> CheckpointInfo:
        """Open a checkpoint; an adapter needs the model that it adapts as `base`. Raises InvalidCheckpoint."""
        folder, root = self._place(model)
        info = inspect_model(self._views.open(folder, model.source, root), model.source, base)
        if model.state not in (None, checkpoint_state(info)):
            raise InvalidCheckpoint(model.source, "its files were changed after the job was accepted; post it again")
        self.expected |= {folder / name: ExpectedFile(model.source, name, of) for name, of in model.sha256.items()}
        return info

    def statistics(self, plan: MergePlan, model: int, spec: CheckpointSpec) -> dict[str, TensorInfo]:
        """Open a statistic of a model of the plan. Returns `given_tensors`. Raises InvalidStatistics."""
        place, root = self._place(spec)
        return given_tensors(plan, model, self._views, place, spec.source, root)

    def _place(self, spec: CheckpointSpec) -> tuple[Path, Path]:
        """Return the place of an input, and the folder that its links must not lead out of."""
        if spec.hub is not None and self._fetched is not None:
            folder = self._fetched.checkpoints[spec.hub]
            return folder, folder.parent.parent  # the repository's part of the cache
        if spec.path is not None:
            return spec.path, spec.root or Path("/")
        raise TypeError(f"{spec.source} is neither a folder nor on the hub")

    def rows(self, spec: DatasetSpec, reader: RowReader) -> Rows:
        """Open a data set. Raises InvalidDataset."""
        if spec.hub is not None and self._fetched is not None:
            return self._fetched.rows(spec, reader)
        if spec.path is not None and spec.root is not None:
            opened = self._views.open_file(spec.path, spec.source, spec.root)
            spec = spec.model_copy(update={"path": opened, "folder": spec.path.parent})
        if is_parquet(spec):
            preload()
            from worker.engine.inputs.tables import read_parquet

            return read_parquet(spec, reader)
        return RowFile(spec, reader)
