"""Files of a store that is not on this machine are read by clients from there."""

from dataclasses import dataclass
from typing import BinaryIO

from app.api.conditional import Preconditions
from app.api.files import held_open, serve


@dataclass(frozen=True)
class SignedFile:
    """A file that clients read by a signed address."""

    name: str = "models/a/model.safetensors"
    bytes: int = 8
    sha256: str = "0" * 64
    modified: float = 0
    url: str = "https://storage.example.org/a?signature=x"

    def check(self) -> None:
        pass

    def open(self) -> BinaryIO:
        raise AssertionError("nobody here reads it")


def test_a_file_that_clients_read_elsewhere_is_redirected_to() -> None:
    file, held = held_open(SignedFile())
    closed: list[bool] = []
    held.callback(closed.append, True)
    response = serve(file, held, Preconditions(None, None, None, None))
    assert (response.status_code, response.headers["location"]) == (307, "https://storage.example.org/a?signature=x")
    assert closed == [True]
