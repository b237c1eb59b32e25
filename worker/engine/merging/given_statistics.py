"""Statistics of a model that come from files instead of being measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from worker.engine.catalog.checkpoints.info import TensorInfo
from worker.engine.catalog.primitives.errors import InvalidStatistics
from worker.engine.checkpoints.reader import TensorReader, file_identity
from worker.engine.checkpoints.row_blocks import is_finite, row_blocks


@dataclass(frozen=True)
class FileRows:
    """A tensor in a file, whose rows are read when they are asked for."""

    tensor: TensorInfo
    reader: TensorReader

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.reader.read(self.tensor, rows if self.shape else None)


@dataclass(frozen=True)
class GivenStatistic(Mapping[str, FileRows]):
    """A statistic of every merged parameter of a model, by `Slot.name`, in the formats of its files."""

    source: str
    """Reference of the files."""
    digest: str
    tensors: Mapping[str, TensorInfo]
    reader: TensorReader
    identities: Mapping[str, tuple[int, ...]]
    """What `file_identity` was of each file when it was digested."""

    def __getitem__(self, name: str) -> FileRows:
        return FileRows(self.tensors[name], self.reader)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check_unchanged(self) -> None:
        """Raise InvalidStatistics where a file was written to since it was digested."""
        if identities_of(self.tensors) != self.identities:
            raise InvalidStatistics(self.source, "its files were changed while the job ran; post it again")


def identities_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return `file_identity` of the files of tensors, by the file's name."""
    paths = {tensor.path for tensor in tensors.values()}
    return {path.name: file_identity(path.stat()) for path in sorted(paths)}


def check_information(information: GivenStatistic) -> None:
    """Check that Fisher information is a mean of squares.

    Raises:
        InvalidStatistics: a value is NaN, infinite or below 0, and the message names the tensor; or all are 0.
    """
    source, is_zero = information.source, True
    for name, tensor in information.tensors.items():
        for rows in row_blocks(tensor.shape):
            part = information[name][rows]
            used = part.float()  # merging computes with these
            where = f"tensor {tensor.name} in {tensor.file}"
            if not is_finite(used):
                what = "too large for float32" if is_finite(part) else "NaN or infinite"
                raise InvalidStatistics(source, f"{where} has values that are {what}", tensor=tensor.name)
            least, most = (part.min(), used.max()) if part.numel() else (0.0, 0.0)
            if least < 0:
                problem = f"{where} has values below 0, and Fisher information is a mean of squares"
                raise InvalidStatistics(source, problem, tensor=tensor.name)
            is_zero &= not most > 0
    if is_zero:
        problem = "all values are 0 in float32, so the model would be left out; leave it out, or measure it"
        raise InvalidStatistics(source, problem)
