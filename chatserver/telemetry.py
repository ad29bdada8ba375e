"""Structured logs: one line per event, and no line with a token or a secret in it.

``configure()`` once per process, ``logger(name)`` anywhere. An event is a short constant name with
its facts as keywords: ``log.info("worker_ready", slot=0, pid=4711)``. On a terminal a line is
``time level event key=value …``, otherwise one JSON object.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

REDACTED = "[redacted]"

# Longer values are cut first: it bounds a line, and the time that the patterns below may take.
LONGEST_VALUE = 4096
LONGEST_TRACEBACK = 16384
_DEEPEST = 6

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A JWT begins with {" in base64. Cut off before its signature it is still nobody's business.
    (re.compile(r"eyJ[\w-]*\.[\w-]*(?:\.[\w-]*)*"), REDACTED),
    (re.compile(r"rt1\.[\w.-]+"), REDACTED),  # A refresh token.
    (re.compile(r"(?i)\b(bearer(?:\s+|\.|%20))[^\s,;\"']+"), rf"\1{REDACTED}"),
    (re.compile(r"://[^\s\"'<>]*@"), f"://{REDACTED}@"),
    (
        re.compile(r"(?i)((?:token|secret|password|authorization)=)[^\s&,;\"']+"),
        rf"\1{REDACTED}",
    ),
)
_SECRET_KEYS = ("token", "secret", "secret_previous", "control_key", "authorization", "password")


def redact(text: str) -> str:
    """``text`` without tokens, credentials and the user information of URLs."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def logger(name: str) -> FilteringBoundLogger:
    """The logger of a part of the server; ``name`` goes with every line as ``part``."""
    return cast(FilteringBoundLogger, structlog.get_logger(part=name))


def configure(level: str, stream: TextIO | None = None) -> None:
    """Send what is at ``level`` or above to ``stream`` (standard error), foreign loggers too."""
    out = sys.stderr if stream is None else stream
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,  # The plain traceback: no local variables.
            _redact_event,
            _on_a_terminal if out.isatty() else _as_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _Lines(out),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=number, handlers=[_Foreign()], force=True)
    # A peer that goes away, or that talks nonsense, is not an error of ours.
    peers = logging.getLogger("websockets")
    peers.propagate = False
    peers.handlers = [logging.NullHandler()]


class _Lines:
    """Writes lines. A log that nobody reads any more must not take the server with it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # Its reader went away; the stream is closed.
            pass

    debug = info = warning = error = critical = msg


class _Foreign(logging.Handler):
    """Takes what libraries log (asyncio, for one) through the same processors."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except (TypeError, ValueError):
            event = str(record.msg)
        logger(record.name).log(record.levelno, "foreign", text=event, exc_info=record.exc_info)


def _redact_event(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {
        key: redact(value[-LONGEST_TRACEBACK:]) if key == "exception" else _clean(value, key)
        for key, value in event.items()
    }


def _clean(value: object, key: str = "", depth: int = 0) -> Any:
    """``value`` as plain JSON types without secrets; what is neither becomes its repr."""
    if key.lower() in _SECRET_KEYS or key.lower().endswith(("_token", "_secret", "_password")):
        return REDACTED
    match value:
        case None | bool():
            return value
        case int() | float():
            # JSON has no NaN, and Python prints no integer of thousands of digits.
            return value if abs(value) < 1e100 else "[out of range]"
        case Mapping() if depth < _DEEPEST:
            return {str(name): _clean(item, str(name), depth + 1) for name, item in value.items()}
        case list() | tuple() | set() | frozenset() if depth < _DEEPEST:
            return [_clean(item, "", depth + 1) for item in value]
        case str():
            return _cut(value)
        case _:
            return _cut(repr(value))


def _cut(text: str) -> str:
    return redact(text[:LONGEST_VALUE]) + ("…" if len(text) > LONGEST_VALUE else "")


def _as_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    return json.dumps(event)


def _on_a_terminal(_: WrappedLogger, __: str, event: EventDict) -> str:
    name = _printable(str(event.pop("event")))
    head = [event.pop("timestamp")[11:19], event.pop("level"), name]
    exception = event.pop("exception", None)
    line = " ".join(head + [f"{key}={_word(value)}" for key, value in event.items()])
    # The one thing that gets more lines: whoever sits at a terminal wants to read it.
    return line if exception is None else line + "\n" + _indented(exception)


def _word(value: object) -> str:
    """As it is where that is unambiguous, otherwise in quotes and without control characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    plain = text.isprintable() and not set(text) & set(' "=')
    return text if text and plain else json.dumps(text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _indented(text: str) -> str:
    return "\n".join("    " + _printable(row) for row in text.split("\n"))
