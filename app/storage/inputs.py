"""References to inputs, resolved to paths that lie under the folders the operator allowed."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

SCHEMES = ("local", "hf", "s3", "job")


class ReferenceError(ValueError):
    """The reference is malformed, not allowed, or names nothing. `available` is False for what comes later."""

    def __init__(self, message: str, *, available: bool = True) -> None:
        super().__init__(message)
        self.available = available


class LocalInputs:
    """`local:PATH` under the local roots, searched in order."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve() for root in roots]

    def resolve(self, reference: str) -> tuple[Path, Path]:
        """(path, the root it lies under).

        Raises:
            ReferenceError: says what is wrong without saying where the roots are.
        """
        scheme, colon, rest = reference.partition(":")
        if not colon or scheme not in SCHEMES:
            raise ReferenceError(f"'{reference}' is no reference; write local:PATH with a path under a local root")
        if scheme != "local":
            raise ReferenceError(f"'{scheme}:' references are not available yet; use local:PATH", available=False)
        if not rest or "\0" in rest:
            raise ReferenceError(f"'{reference}' names no path")
        relative = PurePosixPath(rest)
        if relative.is_absolute() or ".." in relative.parts:
            raise ReferenceError(f"'{reference}' must be a relative path without '..'")
        if not self._roots:
            raise ReferenceError("this service has no local roots; start it with --local-root DIR")
        for root in self._roots:
            path = root / relative
            if path.exists() or path.is_symlink():
                resolved = path.resolve()
                if not resolved.is_relative_to(root):
                    raise ReferenceError(f"'{reference}' is a symbolic link out of its local root")
                if not resolved.exists():
                    raise ReferenceError(f"'{reference}' is a symbolic link to nothing")
                return resolved, root
        raise ReferenceError(f"'{reference}' does not exist under any local root")
