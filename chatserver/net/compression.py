"""permessage-deflate (RFC 7692), shared: what is compressed once serves every receiver.

Always negotiated without context takeover, in both directions. A compressed message then depends
on nothing that was sent before it, so that one event's bytes are right for everyone whose window
is as large; and nothing is kept between messages, neither a window for each connection nor one
user's text beside another's secret.

Only what is shared is compressed: a room's live events, above a size. Replies, replays and history
are for one connection alone and go as they are, which the extension allows for any message.
Otherwise a thousand members that come back would have the same log compressed a thousand times.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import (
    PerMessageDeflate,
    ServerPerMessageDeflateFactory,
)
from websockets.frames import Frame
from websockets.typing import ExtensionParameter

from chatserver.net.connection import text_frame

SMALLEST = 160
"""Bytes of JSON. Below it deflate takes off less than a fifth, for the price of a write."""
WINDOW_BITS = 12
"""4 KiB, or less if a client asks for less. A larger window makes events of up to 4 kB no smaller,
and with 15 bits an event of 200 bytes takes 50 µs instead of 7."""
# zlib's defaults, 6 and 8, win half a percent of an event of 4 kB, and take 77 µs instead of 54.
_LEVEL, _MEMORY_LEVEL = 4, 7


class SharedFrames(dict[int, bytes]):
    """A run of events as WebSocket frames, by the receiver's ``Connection.window_bits``.

    Each form is made when the first receiver needs it, so each event is compressed at most once
    for each window. There are five: none, and 9 to 12 bits.
    """

    def __init__(self, payloads: Sequence[bytes]) -> None:
        super().__init__()
        self._payloads = payloads

    def __missing__(self, window_bits: int) -> bytes:
        made = self[window_bits] = b"".join(
            [frame_for(each, window_bits) for each in self._payloads]
        )
        return made


def frame_for(payload: bytes, window_bits: int) -> bytes:
    """A whole text message, compressed if that is agreed on (not 0) and makes it smaller."""
    if window_bits == 0 or len(payload) < SMALLEST:
        return text_frame(payload)
    data = deflate(payload, window_bits)
    return compressed_frame(data) if len(data) < len(payload) else text_frame(payload)


def compressed_frame(data: bytes) -> bytes:
    """A whole text message that is compressed already."""
    return b"\xc1" + text_frame(data)[1:]  # RSV1


def deflate(payload: bytes, window_bits: int) -> bytes:
    compressor = zlib.compressobj(_LEVEL, wbits=-window_bits, memLevel=_MEMORY_LEVEL)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return data[:-4]  # The mark of the flush is left out (section 7.2.1).


class SharedDeflate(ServerPerMessageDeflateFactory):
    """Agrees to offers of the extension, on our terms. One that they do not fit is declined."""

    def __init__(self) -> None:
        # A server may ask for client_no_context_takeover unoffered (section 7.1.1.2).
        super().__init__(
            server_no_context_takeover=True,
            client_no_context_takeover=True,
            server_max_window_bits=WINDOW_BITS,
        )

    def process_request_params(
        self, params: Sequence[ExtensionParameter], accepted_extensions: Sequence[Extension]
    ) -> tuple[list[ExtensionParameter], PerMessageDeflate]:
        agreed, theirs = super().process_request_params(params, accepted_extensions)
        ours = BoundedInflate(
            True, True, theirs.remote_max_window_bits, theirs.local_max_window_bits
        )
        return agreed, ours


class BoundedInflate(PerMessageDeflate):
    """websockets' reading of what clients compressed, with the two bounds that it lacks."""

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        decoded = super().decode(frame, max_size=max_size)
        size = len(decoded.data)
        if max_size is not None and size > max_size:
            # A limit of 0, what is left to a full message, is none to zlib: it gives out all that
            # it has held back.
            raise PayloadTooBig(size, max_size)
        if decoded is not frame and not frame.fin and len(self.decoder.unused_data) > 1:
            # zlib keeps all that follows a final block, and copies it with every fragment: 256 MiB
            # and minutes. By section 7.2.3.4 a byte of padding may follow.
            raise ProtocolError("data after the final block")
        return decoded
