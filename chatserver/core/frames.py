"""The wire types of protocol.md: commands in, frames out.

A frame is read twice. orjson first: it is strict (RFC 8259 to the letter, no lone surrogates, no
number beyond a double), so whatever passes can be read by every receiver. msgspec second: it
checks the fields' types, names the path of what is wrong, and keeps ``body`` as the bytes that
came in, so that they go out untouched.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal, NoReturn, Protocol

import msgspec
import orjson
from msgspec import UNSET, Meta, Raw, UnsetType

from chatserver.core.errors import MESSAGES, Disconnect, ReplyCode

MAX_SAFE_INTEGER = 2**53 - 1
BODY_DEPTH = 64
ROOM_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}\Z"

CommandId = int | str
Room = Annotated[str, Meta(pattern=ROOM_NAME)]
_Id = (
    Annotated[int, Meta(ge=1, le=MAX_SAFE_INTEGER)]
    | Annotated[str, Meta(min_length=1, max_length=64)]
    | UnsetType
)
_Offset = Annotated[int, Meta(ge=0, le=MAX_SAFE_INTEGER)]
_Key = Annotated[str, Meta(min_length=1, max_length=64)]


class NotText(Exception):
    """The payload is not UTF-8: RFC 6455 section 8.1 asks for close code 1007."""


class NotAFrame(Exception):
    """The text is not one JSON object: no reply is possible, the connection ends."""


class InvalidCommand(Exception):
    """A JSON object that is no command of this protocol. Answered with an ``error``."""

    def __init__(self, code: ReplyCode, *, id: CommandId | None, path: str | None = None) -> None:
        super().__init__(code.value, path)
        self.code = code
        self.id = id
        self.path = path


# --- commands ------------------------------------------------------------------------------


class Since(msgspec.Struct, frozen=True, gc=False):
    epoch: Annotated[str, Meta(min_length=1, max_length=64)]
    offset: _Offset


class Command(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    id: _Id = UNSET

    @property
    def reply_to(self) -> CommandId | None:
        return None if self.id is UNSET else self.id


class Join(Command, frozen=True, kw_only=True, gc=False):
    room: Room
    since: Since | UnsetType = UNSET
    last: Annotated[int, Meta(ge=0, le=256)] | UnsetType = UNSET


class Leave(Command, frozen=True, kw_only=True, gc=False):
    room: Room


class Send(Command, frozen=True, kw_only=True, gc=False):
    body: Raw
    room: Room | UnsetType = UNSET
    rooms: Annotated[tuple[Room, ...], Meta(min_length=1, max_length=16)] | UnsetType = UNSET
    key: _Key | UnsetType = UNSET
    echo: bool = True


class History(Command, frozen=True, kw_only=True, gc=False):
    room: Room
    before: _Offset | UnsetType = UNSET
    after: _Offset | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=256)] = 50


class Refresh(Command, frozen=True, kw_only=True, gc=False):
    token: str

    def __repr__(self) -> str:
        return f"<Refresh id={self.id!r}>"


class Logout(Command, frozen=True, kw_only=True, gc=False):
    pass


class Ping(Command, frozen=True, kw_only=True, gc=False):
    pass


class _Decoder(Protocol):
    def decode(self, data: bytes, /) -> Command: ...


DECODERS: dict[str, _Decoder] = {
    "join": msgspec.json.Decoder(Join),
    "leave": msgspec.json.Decoder(Leave),
    "send": msgspec.json.Decoder(Send),
    "history": msgspec.json.Decoder(History),
    "refresh": msgspec.json.Decoder(Refresh),
    "logout": msgspec.json.Decoder(Logout),
    "ping": msgspec.json.Decoder(Ping),
}


def parse_command(data: bytes) -> Command:
    """One text frame's payload as a command.

    Raises NotText, NotAFrame or InvalidCommand, and nothing else, whatever the bytes.
    """
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        _refuse(data)
    if type(document) is not dict:
        raise NotAFrame
    kind = document.get("type")
    if type(kind) is not str:
        raise InvalidCommand(ReplyCode.INVALID, id=_id_of(document), path="$.type")
    decoder = DECODERS.get(kind)
    if decoder is None:
        raise InvalidCommand(ReplyCode.UNKNOWN_TYPE, id=_id_of(document))
    try:
        command = decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise InvalidCommand(
            ReplyCode.INVALID, id=_id_of(document), path=_path_of(str(error))
        ) from None
    except RecursionError:  # msgspec's own, from members nested hundreds deep
        raise _unreadable(document) from None
    if type(command) is Send:
        _check_send(command)
    elif type(command) is History and not (command.before is UNSET or command.after is UNSET):
        raise InvalidCommand(ReplyCode.INVALID, id=_id_of(document), path="$.after")
    return command


def _check_send(command: Send) -> None:
    """What no type can say: one destination, different rooms, a body that is not too deep."""
    path = None
    if (command.room is UNSET) == (command.rooms is UNSET):
        path = "$.room"
    elif command.rooms is not UNSET and len(set(command.rooms)) != len(command.rooms):
        path = "$.rooms"
    elif too_deep(bytes(command.body)):
        path = "$.body"
    if path:
        raise InvalidCommand(ReplyCode.INVALID, id=command.reply_to, path=path)


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')
_ROUND = bytes.maketrans(b"[{]}", b"(())")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def too_deep(raw: bytes) -> bool:
    """Whether this JSON is nested more than BODY_DEPTH levels."""
    # Fewer brackets than levels allowed: no need to look, which is nearly every message.
    if raw.count(b"[") + raw.count(b"{") <= BODY_DEPTH:
        return False
    # The bytes are judged, not what was made of them: of two members of one name the parsed
    # body has but the last. Each round peels off what is innermost everywhere.
    brackets = _STRING.sub(b"", raw).translate(_ROUND, _NO_BRACKETS)
    for _ in range(BODY_DEPTH):
        brackets = brackets.replace(b"()", b"")
    return bool(brackets)


def _refuse(data: bytes) -> NoReturn:
    """Say why orjson did not take it: not text, not JSON, or JSON that others could not read."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise NotText from None
    try:
        document = _loads(text)
    except ValueError:
        raise NotAFrame from None
    except RecursionError:
        try:
            document = _loads(_shallow(text))
        except ValueError:
            raise NotAFrame from None
    if not isinstance(document, dict):
        raise NotAFrame
    raise _unreadable(document)


def _unreadable(document: dict[str, object]) -> InvalidCommand:
    path = "$.body" if "body" in document else "$"
    return InvalidCommand(ReplyCode.INVALID, id=_id_of(document), path=path)


def _loads(text: str) -> object:
    return json.loads(text, parse_int=_bounded, parse_constant=_no_constant)


_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}]')


def _shallow(text: str) -> str:
    """The outermost value with null for what nests in it: enough to find the id to answer."""
    kept: list[str] = []
    depth = start = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        if found[0] in "[{":
            depth += 1
            if depth == 2:
                kept += text[start : found.start()], "null"
        elif found[0] in "]}":
            depth -= 1
            if depth == 1:
                start = found.end()
    if depth:
        raise ValueError("brackets without end")
    return "".join([*kept, text[start:]])


def _bounded(digits: str) -> int:
    # Python refuses 5,000 digits with a ValueError that would pass for bad grammar.
    return int(digits) if len(digits) <= 16 else 0


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


def _id_of(document: dict[str, object]) -> CommandId | None:
    """The id to answer to, if it is one."""
    value = document.get("id")
    if type(value) is int and 1 <= value <= MAX_SAFE_INTEGER:
        return value
    if type(value) is str and 1 <= len(value) <= 64 and _encodable(value):
        return value
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_MISSING = re.compile(r"missing required field `(?P<field>[^`]*)`(?: - at `(?P<path>[^`]*)`)?")
_AT = re.compile(r" - at `(?P<path>[^`]*)`")


def _path_of(message: str) -> str:
    """The JSON path that msgspec's message tells."""
    if missing := _MISSING.search(message):
        return f"{missing['path'] or '$'}.{missing['field']}"
    at = _AT.search(message)
    return at["path"] if at else "$"


# --- replies and events --------------------------------------------------------------------

dumps = orjson.dumps
Fragment = orjson.Fragment


def ack(id: CommandId, **fields: object) -> bytes:
    return dumps({"type": "ack", "id": id, **fields})


def error(
    code: ReplyCode,
    *,
    id: CommandId | None = None,
    path: str | None = None,
    retry_after: int | None = None,
) -> bytes:
    """An ``error`` frame. ``retry_after`` in milliseconds."""
    frame: dict[str, object] = {"type": "error"}
    if id is not None:
        frame["id"] = id
    return dumps(frame | refusal(code, path=path, retry_after=retry_after))


def refusal(
    code: ReplyCode, *, path: str | None = None, retry_after: int | None = None
) -> dict[str, object]:
    """The fields that tell what was refused, of an ``error`` frame or of one room's result."""
    fields: dict[str, object] = {"code": code, "message": MESSAGES[code]}
    if path is not None:
        fields["path"] = path
    if retry_after is not None:
        fields["retry_after"] = retry_after
    return fields


def bye(disconnect: Disconnect, after: int | None = None) -> bytes:
    """The frame before a close frame. ``after`` in milliseconds."""
    frame: dict[str, object] = {
        "type": "bye",
        "code": disconnect.code,
        "reason": disconnect.reason,
        "reconnect": disconnect.reconnect,
    }
    if after is not None and disconnect.reconnect:
        frame["after"] = after
    return dumps(frame)


def left(room: str, reason: Literal["forbidden", "kicked", "banned", "closed"]) -> bytes:
    return dumps({"type": "left", "room": room, "reason": reason})


def epoch(room: str, epoch: str) -> bytes:
    return dumps({"type": "epoch", "room": room, "epoch": epoch})


def reset(room: str, epoch: str, offset: int) -> bytes:
    return dumps({"type": "reset", "room": room, "epoch": epoch, "offset": offset})


def skip(room: str, offset: int) -> bytes:
    return dumps({"type": "skip", "room": room, "offset": offset})


def expiring(expires_at: int, *, now: bool = False) -> bytes:
    """``expires_at`` in milliseconds since the epoch."""
    frame: dict[str, object] = {"type": "expiring", "expires_at": expires_at}
    if now:
        frame["now"] = True
    return dumps(frame)


_TAKEN_AT = re.compile(rb'"offset":[0-9]+,"ts":([0-9]{1,16}),')


def taken_at(event: bytes) -> float | None:
    """When the store took this ``message``, in seconds by its clock: the event's ``ts``.

    None if it has none; what comes from a user stands behind it.
    """
    found = _TAKEN_AT.search(event)
    return None if found is None else int(found[1]) / 1000


def message_parts(room: str, user: str, body: Raw, key: str | None) -> tuple[bytes, bytes]:
    """A ``message`` event without its place: the store puts offset and ts in between.

    The event is the first part, the offset, ``,"ts":``, the milliseconds, and the second part.
    """
    head = b'{"type":"message","room":"%b","offset":' % room.encode()  # a room needs no escapes
    tail = b',"user":%b' % dumps(user)
    if key is not None:
        tail += b',"key":%b' % dumps(key)
    return head, b'%b,"body":%b}' % (tail, bytes(body))
