"""What happened in a run: small typed records, one JSON object a line.

A client in any language can write such a file, and the checker reads it without a server. Times
are seconds since the Unix epoch on one clock that all writers share. The records of one member
stand in the order in which it saw them; those of different members may be mixed in any way.

A *member* is one client with its positions, whatever its connections; a *connection* has a name
that no other one has in the run. ``received`` is every ``message`` and ``skip`` as it came, also
one that a client ought to drop, with two exceptions: what shows a hole, and what comes between
that and the answer to the join that asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal, Self

import msgspec


class _Record(
    msgspec.Struct,
    kw_only=True,
    gc=False,  # Millions of them, none in a cycle.
    tag_field="type",
    tag=str.lower,
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    at: float


class Position(msgspec.Struct, frozen=True, gc=False):
    epoch: str
    offset: int


class Mark(_Record):
    """``healed``: the last fault is over. ``quiet``: nobody publishes any more. ``end``: what
    comes later is only the clients' leaving."""

    name: Literal["healed", "quiet", "end"]


class Session(_Record):
    """A member's login, and what its tokens give: rights by room, or by a prefix with ``*``."""

    member: str
    session: str
    rooms: dict[str, str]


class Revoked(_Record):
    """The server has said that the session is revoked."""

    session: str


class Connected(_Record):
    """``welcome`` came. ``began``: when the client began to connect."""

    member: str
    session: str
    connection: str
    began: float


class Closed(_Record):
    """The connection is over; 1006: nobody said why."""

    member: str
    connection: str
    code: int


class Joined(_Record):
    """The ``ack`` of a join. ``gap`` is inclusive."""

    member: str
    connection: str
    room: str
    epoch: str
    offset: int
    replay: int
    since: Position | None = None
    recovered: bool | None = None
    gap: tuple[int, int] | None = None


class Left(_Record):
    """``left``, the ack of a ``leave``, or a join that was refused."""

    member: str
    connection: str
    room: str
    reason: str


class Received(_Record):
    """``epoch`` is the member's own at that moment. ``ts``: the event's, in milliseconds."""

    member: str
    connection: str
    room: str
    epoch: str
    offset: int
    kind: Literal["message", "skip"] = "message"
    key: str = ""
    ts: int = 0


class Hole(_Record):
    """A live event that was beyond the next offset."""

    member: str
    connection: str
    room: str
    expected: int
    got: int


class Reset(_Record):
    member: str
    connection: str
    room: str
    epoch: str
    offset: int


class Epoch(_Record):
    member: str
    connection: str
    room: str
    epoch: str


class Sent(_Record):
    """One message to one room, written when its outcome is settled.

    ``failed``: every attempt was refused for good. ``unknown``: one at least was not answered, or
    was ``unavailable``, and no repetition was acked. ``connection`` and ``attempt`` are of the
    attempt that was answered: attempts count up on each connection, in the order sent. ``began``
    is the first attempt's time, ``tried`` that one's. Without ``echo`` that connection is not to be
    shown it, but in the replay of a join.
    """

    sender: str
    sequence: int
    room: str
    key: str
    outcome: Literal["ok", "failed", "unknown"]
    began: float
    tried: float = 0.0
    connection: str = ""
    attempt: int = 0
    epoch: str = ""
    offset: int = 0
    duplicate: bool = False
    code: str = ""
    echo: bool = True


class Fault(_Record):
    """A fault begins or ends. ``members``: whose links it touches."""

    id: int
    name: str
    phase: Literal["begin", "end"]
    detail: str = ""
    members: tuple[str, ...] = ()


class Final(_Record):
    """The end of a room's log, as a ``history`` command told it in the quiet."""

    room: str
    epoch: str
    offset: int


class Logged(_Record):
    """One entry of a room's log, read from the store itself in the end."""

    room: str
    epoch: str
    """Empty: the log has not gone on yet since the store's history may have forked."""
    offset: int
    key: str


Record = (
    Mark
    | Session
    | Revoked
    | Connected
    | Closed
    | Joined
    | Left
    | Received
    | Hole
    | Reset
    | Epoch
    | Sent
    | Fault
    | Final
    | Logged
)

_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_encoder = msgspec.json.Encoder()


def encode(record: Record) -> bytes:
    return _encoder.encode(record)


def decode(line: bytes) -> Record:
    """Raises msgspec.ValidationError."""
    return _decoder.decode(line)


class History:
    """The records of a run, in memory and, with a path, in a file as they come."""

    def __init__(self, path: Path | None = None) -> None:
        self.records: list[Record] = []
        self._file: IO[bytes] | None = path.open("wb") if path else None

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(encode(record) + b"\n")

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @classmethod
    def read(cls, path: Path) -> Self:
        history = cls()
        with path.open("rb") as lines:
            history.records.extend(decode(line) for line in lines if line.strip())
        return history


def write(records: Iterable[Record], path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(encode(record) + b"\n" for record in records)
