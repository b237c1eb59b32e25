"""The first rows of a file that lies elsewhere."""

from collections.abc import Callable
from pathlib import Path

from worker.engine.catalog.data.rows import FIRST_ROWS, PARQUET

SMALL_BYTES = 1 << 20  # read whole, and as much is read of a larger file first
MOST_BYTES = 16 << 20
PARQUET_BYTES = 512
CSV = ".csv"


def first_rows(path: Path, size: int, read: Callable[[int, int], bytes]) -> bool:
    """Write the beginning of a file with more rows than are checked before a job is accepted, or the whole of it.

    Of Parquet, it is a beginning from which the format is told.

    Args:
        read: returns the bytes from one place to another.

    Returns:
        False, and there is nothing, where the rows are too long: only the worker looks at them then.
    """
    if path.suffix.lower() == PARQUET:
        path.write_bytes(read(0, min(PARQUET_BYTES, size)))
        return True
    content = b""
    wanted = SMALL_BYTES
    while wanted <= MOST_BYTES:
        content += read(len(content), min(wanted, size))
        if len(content) >= size:
            path.write_bytes(content)
            return True
        end = _end_of_rows(content, has_quotes=path.suffix.lower() == CSV)
        if end is not None:
            path.write_bytes(content[:end])
            return True
        wanted *= 4
    return False


def _end_of_rows(content: bytes, *, has_quotes: bool) -> int | None:
    """Return where the last row ends that is whole; None where there are too few.

    Args:
        has_quotes: whether a line break within quotes ends no row; then an even number of quotes before it tells.
    """
    ends, quotes, begin, last = 0, 0, 0, 0
    while (at := content.find(b"\n", begin)) >= 0:
        if has_quotes:
            quotes += content.count(b'"', begin, at)
        begin = at + 1
        if quotes % 2 == 0:
            ends, last = ends + 1, begin
    return last if ends > FIRST_ROWS + 1 else None  # the first line of CSV has names
