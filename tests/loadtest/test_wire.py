"""The quick reader of frames, against the server's own and against websockets'."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from chatserver.core.frames import message_parts, skip
from load.wire import Chunk, Events, Other, Reader, Text, body, read

OURS = json.dumps(body(123, "hello"), separators=(",", ":")).encode()


def event(
    room: str = "r",
    offset: int = 1,
    content: bytes = OURS,
    user: str = "u",
    key: str | None = None,
) -> bytes:
    """As the server builds it."""
    head, tail = message_parts(room, user, msgspec.Raw(content), key)
    return head + b'%d,"ts":1759999990000' % offset + tail


def framed(*payloads: bytes) -> bytes:
    return b"".join(Frame(Opcode.TEXT, each).serialize(mask=False) for each in payloads)


def test_events_of_ours_are_read_with_place_and_time() -> None:
    assert read(framed(event("general", 7))).items == [Events(b"general", 7, 7, [123])]


@given(user=st.text(min_size=1), key=st.none() | st.text(min_size=1))
def test_whatever_users_and_keys_are_called(user: str, key: str | None) -> None:
    assert read(framed(event("r", 3, user=user, key=key))).items == [Events(b"r", 3, 3, [123])]


def test_consecutive_events_of_one_room_are_one_item() -> None:
    chunk = read(framed(event("a", 1), event("a", 2), event("b", 9), event("a", 3), event("a", 5)))

    assert chunk.items == [
        Events(b"a", 1, 2, [123, 123]),
        Events(b"b", 9, 9, [123]),
        Events(b"a", 3, 3, [123]),
        Events(b"a", 5, 5, [123]),
    ]


def test_other_frames_keep_their_place_between_events() -> None:
    place = skip("a", 2)
    ping = Frame(Opcode.PING, b"?").serialize(mask=False)
    chunk = read(framed(event("a", 1), place) + ping + framed(event("a", 3)))

    assert chunk.items == [
        Events(b"a", 1, 1, [123]),
        Text(place),
        Other(ping),
        Events(b"a", 3, 3, [123]),
    ]


@pytest.mark.parametrize("content", [b'"text"', b'{"text":"t"}', b'{"t":"7"}', b'{"t":null}'])
def test_bodies_of_others_are_left_to_json(content: bytes) -> None:
    payload = event(content=content)

    assert read(framed(payload)).items == [Text(payload)]


@pytest.mark.parametrize("size", [1, 125, 126, 65_535, 65_536])
def test_a_frame_is_taken_when_it_is_whole(size: int) -> None:
    data = framed(b"x" * size)

    assert read(data) == Chunk([Text(b"x" * size)], len(data))
    for cut in {1, 2, len(data) - 1} - {len(data)}:
        assert read(data[:cut]) == Chunk([], 0)
    assert read(data + data[:1]).used == len(data)


def test_a_masked_frame_is_for_websockets_to_refuse() -> None:
    data = Frame(Opcode.TEXT, b"x").serialize(mask=True)

    assert read(data) == Chunk([Other(data)], len(data))


def test_the_same_bytes_again_are_not_read_again() -> None:
    reader, data = Reader(), framed(event())
    first = reader.read(data)

    assert reader.read(bytes(bytearray(data))) is first
    assert reader.read(framed(event(offset=2))).items == [Events(b"r", 2, 2, [123])]
