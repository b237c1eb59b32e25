"""References to inputs, as `local:experts/a`. `app.storage.sources` knows what may follow a scheme."""

from dataclasses import dataclass

SCHEMES = ("local", "hf", "s3", "upload", "job")


class ReferenceError(ValueError):
    """The reference is malformed, not allowed, or names nothing.

    Args:
        available: False for references that only a later version can read.
    """

    def __init__(self, message: str, *, available: bool = True) -> None:
        super().__init__(message)
        self.available = available


@dataclass(frozen=True)
class Reference:
    scheme: str
    rest: str

    def __str__(self) -> str:
        return f"{self.scheme}:{self.rest}"

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Raises ReferenceError when the text begins with no scheme that is known."""
        scheme, colon, rest = text.partition(":")
        if not colon or scheme not in SCHEMES:
            raise ReferenceError(
                f"'{text}' is no reference; write local:PATH, hf:ORG/NAME@REVISION, s3:BUCKET/PREFIX, upload:SHA256 or "
                "job:ID/MODEL"
            )
        return cls(scheme, rest)


def is_reference(text: str) -> bool:
    """Return whether the text begins with a scheme; the rest may be malformed."""
    scheme, colon, _ = text.partition(":")
    return bool(colon) and scheme in SCHEMES
