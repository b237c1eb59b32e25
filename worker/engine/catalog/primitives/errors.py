"""Everything that can go wrong in the work itself.

EngineError
├── InvalidRequest          the recipe asks for what cannot be done
├── InvalidCheckpoint       one checkpoint is broken, unsafe or unknown
├── IncompatibleCheckpoints two checkpoints do not fit each other
├── InvalidDataset          a file, column, row or label
├── InvalidStatistics       a file of statistics is broken, or not of its model
├── NumericalError          the arithmetic left the finite numbers
├── OutOfMemory
├── DiskFull
└── StorageError            the hub, the cache of what was downloaded, a folder, or the limit on open files
"""

from typing import ClassVar, Literal, NamedTuple

from worker.engine.catalog.primitives.paths import told, without_paths


class Place(NamedTuple):
    """A place in a data set: a line of a file, or a row of a table, counted from 1."""

    unit: Literal["line", "row"]
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


class EngineError(Exception):
    """Base of all errors. `message` is for a person; `detail` holds the same facts as fields.

    `code` is one of the stable job error codes; `retryable` says whether the same job may succeed another time.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **detail: object) -> None:
        # Inputs may hold halves of surrogate pairs, which UTF-8 cannot encode.
        self.message = without_paths(_encodable(message))
        self.detail = {
            key: _encodable(value) if isinstance(value, str) else value for key, value in told(detail).items()
        }
        super().__init__(self.message)


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


class InvalidRequest(EngineError):
    code = "invalid_request"


class InvalidCheckpoint(EngineError):
    code = "invalid_checkpoint"

    def __init__(self, checkpoint: str, problem: str, **detail: object) -> None:
        super().__init__(f"checkpoint {checkpoint}: {problem}", checkpoint=checkpoint, **detail)


class IncompatibleCheckpoints(EngineError):
    code = "incompatible_checkpoints"

    def __init__(self, first: str, second: str, problem: str, **detail: object) -> None:
        super().__init__(f"checkpoints {first} and {second}: {problem}", first=first, second=second, **detail)


class InvalidDataset(EngineError):
    code = "invalid_dataset"

    def __init__(self, source: str, problem: str, place: Place | None = None, **detail: object) -> None:
        where = f"{source}, {place}" if place else source
        facts = {place.unit: place.number} if place else {}
        super().__init__(f"data set {where}: {problem}", source=source, **facts, **detail)


class InvalidStatistics(EngineError):
    code = "invalid_statistics"

    def __init__(self, source: str, problem: str, **detail: object) -> None:
        super().__init__(f"statistics {source}: {problem}", source=source, **detail)


class NumericalError(EngineError):
    code = "numerical_error"


class OutOfMemory(EngineError):
    code = "out_of_memory"


class DiskFull(EngineError):
    code = "disk_full"
    retryable = True


class StorageError(EngineError):
    code = "storage_error"
    retryable = True


def is_of_library(error: BaseException) -> bool:
    """Return whether it is an error, or a panic of compiled code, as tokenizers has for some files; no stop signal."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
