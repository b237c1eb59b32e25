"""The protocols by which libraries of the engine's process may open files.

The description of a data set may name files at any address, which the library `datasets` would call to build it or to
decode a row. It asks fsspec, whose table of protocols belongs to the whole process. So this is a rule of the process:
it is set once, when the process starts, and holds to its end.
"""

from fsspec.registry import known_implementations

ALLOWED = frozenset({"hf", "file", "local", "zip", "tar"})


def forbid_others() -> None:
    """Let fsspec open files by no protocol but the allowed ones."""
    for protocol in known_implementations.keys() - ALLOWED:
        del known_implementations[protocol]


def require_others_forbidden() -> None:
    """Raise RuntimeError where `forbid_others` was not called."""
    if not known_implementations.keys() <= ALLOWED:
        raise RuntimeError("this process may open files at any address; call forbid_others when it starts")
