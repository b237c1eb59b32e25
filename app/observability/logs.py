"""Logs of every process have one format, as text or as a JSON object a line, and tell no secret."""

import logging
import re
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from app.contracts.settings import LogFormat
from app.observability.context import facts

# Nothing should bring a secret into a message. What looks like one is left out all the same: API keys, secrets of
# webhooks, tokens of the hub, and passwords in URLs.
SECRET = re.compile(
    r"(?<=mm_[0-9a-f]{16}_)[A-Za-z0-9_-]{43}|(?<=whsec_)[A-Za-z0-9+/=_-]{16,}|(?<=hf_)[A-Za-z0-9]{20,}"
    r"|(?<=://)[^\s/@]*:[^\s/@]*(?=@)"
)
MARKS = (
    "mm_",
    "whsec_",
    "hf_",
    "@",
)  # one of them is in every secret; to look for these first takes a tenth of the time
COLOURED = "color_message"  # uvicorn repeats its messages in it, with codes for terminals


class TextLines(logging.Formatter):
    """A line of text for each message, with the facts at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in facts().items())])

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class JsonLines(JsonFormatter):
    """A JSON object for each message: time, level, process, logger, message, the facts, and what else it has.

    Args:
        process: the kind of process, such as api or worker.
    """

    def __init__(self, process: str) -> None:
        super().__init__(
            ("levelname", "name", "message"),
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            static_fields={"process": process},
            reserved_attrs=[*RESERVED_ATTRS, COLOURED],
        )

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data["time"] = time.replace("+00:00", "Z")
        super().add_fields(log_data, record, message_dict)
        log_data.update(facts())

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def configure(level: str, log_format: LogFormat, process: str) -> None:
    """Have everything that this process logs written to standard error. A process that has handlers keeps them.

    Args:
        process: the kind of process, such as api or worker.
    """
    if logging.root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if log_format == "json" else TextLines())
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_end
    threading.excepthook = lambda end: _log_end(end.exc_type, end.exc_value, end.exc_traceback)


def adopt() -> None:
    """Have libraries that brought handlers of their own, as transformers does, write as all others do."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers.clear()
            logger.propagate = True


def without_secrets(text: str) -> str:
    return SECRET.sub("…", text) if any(mark in text for mark in MARKS) else text


def _log_end(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is None or issubclass(kind, KeyboardInterrupt | SystemExit):
        sys.__excepthook__(kind, error or kind(), trace)
    else:
        logging.getLogger("app").critical("the process or one of its threads ends", exc_info=(kind, error, trace))
