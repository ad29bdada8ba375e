"""The server's frames as types: parsed and checked once, here.

The standard parser, not a faster one: what users may put into a body includes the escapes of lone
surrogates, which stricter parsers take for a broken frame. One user's message must not be able to
disconnect the others.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct, ValidationError, convert, field

T = TypeVar("T")
Frame = dict[str, Any]
# Nothing can be done at a rate of none.
Count = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(gt=0)]
Burst = Annotated[float, Meta(ge=1)]


class FrameError(Exception):
    """The server sent something that is not version 1 of the protocol."""


class Position(Struct, frozen=True):
    """A place in a room's log. Offsets compare only within one epoch."""

    epoch: str
    offset: int


class Limits(Struct, frozen=True):
    """What this connection may do. ``key_window`` is in milliseconds, rates are per second."""

    frame_bytes: Count
    rooms: int
    send_rate: Rate
    send_burst: Burst
    command_rate: Rate
    command_burst: Burst
    key_window: Count
    history: int
    replay: int


class Welcome(Struct, frozen=True):
    """What the server says first. Times are its own clock's, in milliseconds since the epoch."""

    protocol: int
    connection: str
    session: str
    user: str
    roles: tuple[str, ...]
    ts: int
    expires_at: int
    ping_interval: Count
    limits: Limits


class Message(Struct, frozen=True):
    """A message of a room. ``ts`` is in milliseconds since the Unix epoch."""

    room: str
    position: Position
    ts: int
    user: str
    body: Any
    key: str | None = None


class Gap(Struct, frozen=True):
    """Events before ``position`` may be missing; the next ones follow it.

    ``first`` to ``last`` are the offsets missed, where the server could tell; the history may
    still have some of them.
    """

    room: str
    position: Position
    first: int | None = None
    last: int | None = None


class Left(Struct, frozen=True):
    """The server ended this user's stay in a room; nothing of it comes any more."""

    room: str
    reason: str


Event = Message | Gap | Left


class History(Struct, frozen=True):
    """A page of a room's log.

    ``first`` and ``last`` are the offsets the page spans, None when it is empty: go on with
    ``before=first`` or ``after=last``. ``position`` is the end of the log.
    """

    position: Position
    messages: tuple[Message, ...]
    first: int | None
    last: int | None
    more: bool


class Refreshed(Struct, frozen=True):
    """What a new token brought. ``left`` are the rooms it no longer allows."""

    expires_at: int
    roles: tuple[str, ...]
    left: tuple[str, ...]


class Missing(Struct, frozen=True):
    """The inclusive range of offsets that a join could not recover."""

    first: int = field(name="from")
    last: int = field(name="to")


class JoinAck(Struct, frozen=True):
    room: str
    epoch: str
    offset: int
    rights: str
    replay: int
    recovered: bool = True
    gap: Missing | None = None

    @property
    def start(self) -> Position:
        """Where the replay begins: its first event is the next one."""
        return Position(self.epoch, self.offset - self.replay)


class HistoryAck(Struct, frozen=True):
    room: str
    epoch: str
    offset: int
    events: list[Frame]
    more: bool


class Pong(Struct, frozen=True):
    ts: int


class NewEpoch(Struct, frozen=True):
    epoch: str


class ErrorReply(Struct, frozen=True):
    code: str
    message: str = ""
    retry_after: int | None = None
    path: str | None = None


class Bye(Struct, frozen=True):
    code: int
    reason: str
    after: int | None = None


def parse(text: str | bytes) -> Frame:
    """Parse one frame as far as that it is an object."""
    try:
        frame = json.loads(text)
    except (ValueError, RecursionError):
        raise FrameError("the server sent a frame that is not JSON") from None
    if not isinstance(text, str) or not isinstance(frame, dict):
        raise FrameError("the server sent a frame that is not an object in a text frame")
    return frame


def read(frame: Frame, kind: type[T]) -> T:
    """Check ``frame`` into ``kind``; fields that this version does not know are ignored."""
    try:
        return convert(frame, kind)
    except ValidationError as exc:
        raise FrameError(f"the server sent a malformed {frame.get('type')!r}: {exc}") from None


def read_message(frame: Frame, epoch: str) -> Message:
    """Check a ``message`` event, or one of a history; the room's epoch completes its position."""
    return read(frame | {"position": {"epoch": epoch, "offset": frame.get("offset")}}, Message)


def read_history(frame: Frame) -> History:
    """Check the ack of a ``history``. Types not known here count for the span of the page only."""
    ack = read(frame, HistoryAck)
    return History(
        position=Position(ack.epoch, ack.offset),
        messages=tuple(
            read_message(event, ack.epoch) for event in ack.events if event.get("type") == "message"
        ),
        first=ack.events[0].get("offset") if ack.events else None,
        last=ack.events[-1].get("offset") if ack.events else None,
        more=ack.more,
    )


def encode(frame: Frame) -> bytes:
    """Raise ValueError or TypeError for what JSON cannot carry, NaN and lone surrogates too."""
    return json.dumps(frame, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
