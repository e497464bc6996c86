"""The log, on stderr: one line per record, as text or as JSON."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class TextFormatter(logging.Formatter):
    """``nbdfleece: warning: message``, and a traceback below if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        text = f"nbdfleece: {record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object per record; ``time`` is UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def configure(verbosity: int, log_format: LogFormat = "text") -> None:
    """Log warnings; at 1 also what happens, at 2 also what is of use to programmers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[min(verbosity, len(_LEVELS) - 1)])
