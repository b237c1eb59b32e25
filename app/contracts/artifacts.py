"""The files of a job's artifact, as the API lists them."""

from pydantic import BaseModel, ConfigDict


class FileEntry(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """Path within the artifact; it may contain slashes."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Digest of the file, in hexadecimal digits."""
    media_type: str
    """Media type that it is sent with."""
    href: str
    """Path at which it is downloaded."""


class Listing(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    files: list[FileEntry]
    """All files of the artifact."""
    archive: str
    """Path at which all of them are downloaded as one tar."""
