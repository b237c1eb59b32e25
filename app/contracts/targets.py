"""Places that a request may name to publish its merge at, as `hf:acme/reviews`. Addresses and tokens are settings."""

import re
from dataclasses import dataclass

from app.contracts.object_storage import Location

HUB = re.compile(r"hf:(?P<name>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?P<at>)", re.ASCII)
MLFLOW = re.compile(
    r"mlflow:(?P<name>[A-Za-z0-9][A-Za-z0-9_-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,99})(@(?P<at>[A-Za-z][\w-]{0,99}))?",
    re.ASCII,
)
S3 = re.compile(r"s3:(?P<name>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[A-Za-z0-9][A-Za-z0-9._/-]{0,500})(?P<at>)", re.ASCII)
FORMS = {"hf": (HUB, "hf:ORG/NAME"), "s3": (S3, "s3:BUCKET/PREFIX"), "mlflow": (MLFLOW, "mlflow:SERVER/MODEL[@ALIAS]")}
MOST_TARGETS = 8


def compared(place: str) -> str:
    """Return a place, or a pattern of places, as it is compared: names on the hub are the same whatever their case."""
    return place.lower() if place.startswith("hf:") else place


@dataclass(frozen=True)
class Target:
    scheme: str
    name: str
    """The repository, the server and the registered model, or the bucket and the prefix without a slash at its end."""
    at: str | None
    """The alias that the version of a registered model gets."""

    def __str__(self) -> str:
        return f"{self.scheme}:{self.name}" + (f"@{self.at}" if self.at else "")

    @property
    def place(self) -> str:
        """The place without its alias. Two targets with the same place write to the same files."""
        return compared(f"{self.scheme}:{self.name}")

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises ValueError where the text names no place."""
        scheme = text.partition(":")[0]
        if scheme not in FORMS:
            raise ValueError(
                f"'{text[:100]}' is no place to publish at; write {', or '.join(f for _, f in FORMS.values())}"
            )
        pattern, form = FORMS[scheme]
        found = pattern.fullmatch(text)
        if found is None or ".." in text:
            raise ValueError(f"'{text[:100]}' is no place to publish at; write {form}")
        name = found["name"]
        if scheme == "s3":
            try:
                place = Location.parse(name)
            except ValueError as error:
                raise ValueError(f"'{text[:100]}' is no place to publish at: {error}; write {form}") from error
            name = f"{place.bucket}/{place.key}"
        return cls(scheme, name, found["at"] or None)
