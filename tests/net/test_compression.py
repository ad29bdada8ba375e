"""permessage-deflate: what is agreed on, what goes out, and what may come in."""

from __future__ import annotations

import json
import os
import zlib

import pytest
from websockets.datastructures import Headers
from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.frames import Frame, Opcode
from websockets.http11 import Request

from chatserver.net.compression import (
    SMALLEST,
    BoundedInflate,
    SharedDeflate,
    SharedFrames,
    frame_for,
)
from chatserver.net.connection import Connection, text_frame

LIMIT = 65_536
TERMS = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"

# --- the handshake -------------------------------------------------------------------------

OFFERS: dict[str, tuple[str | None, int]] = {
    # the offer: what the server answers; the window of what it may send compressed
    "permessage-deflate": (f"{TERMS}; server_max_window_bits=12", 12),
    "permessage-deflate; client_max_window_bits": (f"{TERMS}; server_max_window_bits=12", 12),
    "permessage-deflate; client_no_context_takeover; server_no_context_takeover": (
        f"{TERMS}; server_max_window_bits=12",
        12,
    ),
    "permessage-deflate; server_max_window_bits=15": (f"{TERMS}; server_max_window_bits=12", 12),
    "permessage-deflate; server_max_window_bits=10": (f"{TERMS}; server_max_window_bits=10", 10),
    "permessage-deflate; server_max_window_bits=9": (f"{TERMS}; server_max_window_bits=9", 9),
    # zlib cannot compress with a window of 256 bytes.
    "permessage-deflate; server_max_window_bits=8": (None, 0),
    "permessage-deflate; server_max_window_bits=8, permessage-deflate": (
        f"{TERMS}; server_max_window_bits=12",
        12,
    ),
    "permessage-deflate, permessage-deflate": (f"{TERMS}; server_max_window_bits=12", 12),
    "permessage-deflate; client_max_window_bits=10": (
        f"{TERMS}; server_max_window_bits=12; client_max_window_bits=10",
        12,
    ),
    "permessage-deflate; server_max_window_bits=16": (None, 0),
    "permessage-deflate; server_max_window_bits": (None, 0),
    "permessage-deflate; server_no_context_takeover; server_no_context_takeover": (None, 0),
    "permessage-deflate; unheard_of": (None, 0),
    "x-webkit-deflate-frame": (None, 0),
}


def answer(connection: Connection, offer: str) -> str | None:
    headers = Headers(
        {
            "Host": "chat.example",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Extensions": offer,
        }
    )
    accepted = connection.accept(Request("/v1/ws", headers))
    assert accepted is not None
    return accepted.extensions


@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_is_accepted_without_context_takeover_or_declined(offer: str) -> None:
    connection = Connection(None, LIMIT, [SharedDeflate()])  # type: ignore[arg-type]

    assert (answer(connection, offer), connection.window_bits) == OFFERS[offer]


def test_without_the_extension_every_offer_is_ignored() -> None:
    connection = Connection(None, LIMIT)  # type: ignore[arg-type]

    assert answer(connection, "permessage-deflate") is None
    assert connection.window_bits == 0


# --- what goes out -------------------------------------------------------------------------


def event(size: int) -> bytes:
    text = "what is said in a room, again and again: " * (size // 40 + 1)
    payload = json.dumps({"type": "message", "room": "general", "body": text}).encode()
    return payload[: size - 2] + b'"}'


def inflated(frame: bytes, window_bits: int) -> bytes:
    """The payload of a compressed frame, read with a window no larger than was agreed on.

    In small pieces: within one, zlib looks as far back as it likes.
    """
    assert frame[0] == 0xC1
    decompressor = zlib.decompressobj(-window_bits)
    data = frame[{126: 4, 127: 10}.get(frame[1], 2) :] + b"\0\0\xff\xff"
    pieces = []
    while piece := decompressor.decompress(data, 100):
        pieces.append(piece)
        data = decompressor.unconsumed_tail
    return b"".join(pieces)


@pytest.mark.parametrize("window_bits", [9, 10, 11, 12])
@pytest.mark.parametrize("size", [SMALLEST, 1000, 5000, 70_000, 1_000_000])
def test_a_compressed_event_needs_no_more_than_the_window_agreed_on(
    size: int, window_bits: int
) -> None:
    # So varied that the compressor would reach as far back as it may.
    payload = event(size // 2) + os.urandom(size // 100).hex().encode() + event(size // 2)
    frame = frame_for(payload, window_bits)

    assert len(frame) < len(payload)
    assert inflated(frame, window_bits) == payload


def test_small_events_go_as_they_are() -> None:
    payload = event(SMALLEST - 1)

    assert frame_for(payload, 12) == text_frame(payload)


def test_what_compression_would_not_make_smaller_goes_as_it_is() -> None:
    payload = os.urandom(1000)

    assert frame_for(payload, 12) == text_frame(payload)


def test_a_run_of_events_is_made_once_in_each_form() -> None:
    payloads = [event(300), event(50), event(400)]
    frames = SharedFrames(payloads)

    assert frames[0] == b"".join(map(text_frame, payloads))
    assert frames[12] == b"".join(frame_for(payload, 12) for payload in payloads)
    assert frames[12] is frames[12]
    assert set(frames) == {0, 12}


# --- what comes in -------------------------------------------------------------------------


def deflated(data: bytes, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    compressor = zlib.compressobj(9, wbits=-15)
    compressed = compressor.compress(data) + compressor.flush(flush)
    return compressed.removesuffix(b"\0\0\xff\xff")


def first(data: bytes, fin: bool = False) -> Frame:
    return Frame(Opcode.TEXT, data, fin, rsv1=True)


def more(data: bytes, fin: bool = False) -> Frame:
    return Frame(Opcode.CONT, data, fin)


@pytest.fixture
def inflate() -> BoundedInflate:
    return BoundedInflate(True, True, 15, 12)


def test_a_message_is_inflated_up_to_the_limit(inflate: BoundedInflate) -> None:
    data = bytes(LIMIT)

    assert inflate.decode(first(deflated(data), True), max_size=LIMIT).data == data
    with pytest.raises(PayloadTooBig):
        inflate.decode(first(deflated(data + b"x"), True), max_size=LIMIT)


def test_a_message_filled_to_the_limit_goes_on_by_nothing_that_was_held_back(
    inflate: BoundedInflate,
) -> None:
    """All of the input is read when the limit is reached, and there is more to come of it."""
    compressed = deflated(bytes(LIMIT + 3000))
    full = next(
        size
        for size in range(len(compressed))
        if len(inflate.decode(first(compressed[:size]), max_size=LIMIT).data) == LIMIT
    )
    inflate.decode(first(compressed[:full]), max_size=LIMIT)

    with pytest.raises(PayloadTooBig):
        inflate.decode(more(b""), max_size=0)


def test_nothing_is_kept_that_follows_the_end_of_a_message(inflate: BoundedInflate) -> None:
    inflate.decode(first(deflated(b"{}", zlib.Z_FINISH)), max_size=LIMIT)

    with pytest.raises(ProtocolError):
        inflate.decode(more(b"x" * 1000), max_size=LIMIT - 2)


def test_a_message_may_end_with_a_final_block(inflate: BoundedInflate) -> None:
    """RFC 7692, section 7.2.3.4; in one frame and in two."""
    final = deflated(b"Hello", zlib.Z_FINISH)

    assert inflate.decode(first(final + b"\0", True), max_size=LIMIT).data == b"Hello"
    assert inflate.decode(first(final), max_size=LIMIT).data == b"Hello"
    assert inflate.decode(more(b"\0", True), max_size=LIMIT - 5).data == b""


def test_between_messages_no_window_is_kept(inflate: BoundedInflate) -> None:
    inflate.decode(first(deflated(b"Hello"), True), max_size=LIMIT)

    assert not hasattr(inflate, "decoder")
    assert not hasattr(inflate, "encoder")
