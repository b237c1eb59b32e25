"""Keys to object storage from a file, in the form that AWS's tools have."""

import configparser
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

READ_AGAIN = timedelta(minutes=10)  # the client asks a few minutes before; so keys can be changed without a restart


class KeyFile:
    """Gives the keys that a file has now, each time that it is called."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> dict[str, Any]:
        """Read the file. Raises ValueError, which never quotes the file."""
        profile = os.environ.get("AWS_PROFILE", "default")
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, configparser.Error) as error:
            raise ValueError(f"the file of MASKMERGE_S3_CREDENTIALS_FILE cannot be read ({_kind(error)})") from None
        if not parser.has_section(profile):
            raise ValueError(f"the file of MASKMERGE_S3_CREDENTIALS_FILE has no section [{profile}]")
        keys = parser[profile]
        if not keys.get("aws_access_key_id") or not keys.get("aws_secret_access_key"):
            what = "no aws_access_key_id and aws_secret_access_key"
            raise ValueError(f"the file of MASKMERGE_S3_CREDENTIALS_FILE has {what} in [{profile}]")
        return {
            "access_key_id": keys["aws_access_key_id"],
            "secret_access_key": keys["aws_secret_access_key"],
            "token": keys.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + READ_AGAIN,
        }


def _kind(error: Exception) -> str:
    return error.strerror or "OSError" if isinstance(error, OSError) else type(error).__name__
