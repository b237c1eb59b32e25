"""What programs import of the distribution `maskmerge`: the client, its errors, and the models of requests and answers.

The service itself is in the packages `app` and `worker`, whose modules may change with every release.
"""

from typing import Any

from app import client
from app.client import *  # noqa: F403 - the list of names is the client's
from app.client import __all__ as __all__


def __getattr__(name: str) -> Any:
    return getattr(client, name)
