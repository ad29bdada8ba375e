"""What is sent is stored once, or it is told that it was not."""

from __future__ import annotations

import time

from conform.cases import case
from conform.peer import Broken, Frame, Peer
from conform.stage import Stage

QUIET = 2.5
"""Seconds in which a client would have repeated what it should not."""


async def _asked(stage: Stage, **limits: int) -> tuple[Peer, Frame]:
    """A client that has sent a message, and has no answer yet."""
    peer = await stage.arrival()
    await peer.begin(offset=4, **limits)
    await peer.ask(5, "hello")
    return peer, await peer.sent("hello")


def _same(first: Frame, again: Frame) -> None:
    if first["key"] != again["key"]:
        raise Broken("it repeated a message under another key")


@case
async def lost_ack(stage: Stage) -> None:
    """What was not acked is repeated on the next connection, with its key, and only once."""
    peer, send = await _asked(stage)
    peer.abort()
    peer = await stage.arrival()
    await peer.begin(offset=5)
    again = await peer.sent("hello")
    _same(send, again)
    await peer.store(again, 6, duplicate=True)
    await peer.nothing("send", QUIET)


@case
async def sent_while_away(stage: Stage) -> None:
    """What the drain did not answer is repeated after it."""
    peer, send = await _asked(stage)
    await peer.bye(1012, "draining", after=500)
    peer = await stage.arrival()
    await peer.begin(offset=5)
    again = await peer.sent("hello")
    _same(send, again)
    await peer.store(again, 6)
    await peer.nothing("send", QUIET)


@case
async def key_window(stage: Stage) -> None:
    """What is older than the key's memory is not repeated, and the application is told."""
    peer, _ = await _asked(stage, key_window=3000)
    await peer.bye(1012, "draining", after=3300)
    peer = await stage.arrival()
    await peer.welcome(key_window=3000)
    await peer.admit(5)
    await peer.told("failed", text="hello")
    await peer.nothing("send", QUIET)


@case
async def rate_limited(stage: Stage) -> None:
    """rate_limited is repeated after retry_after."""
    peer, send = await _asked(stage)
    told = await peer.error(send, "rate_limited", retry_after=1500)
    again = await peer.sent("hello")
    waited = time.monotonic() - told
    if waited < 1.45:
        raise Broken(f"it sent again after {waited:.2f} s, and was told 1.5")
    _same(send, again)
    await peer.store(again, 6)


@case
async def unavailable(stage: Stage) -> None:
    """unavailable may have been stored or not: it is repeated with its key."""
    peer, send = await _asked(stage)
    await peer.error(send, "unavailable")
    again = await peer.sent("hello")
    _same(send, again)
    await peer.store(again, 6, duplicate=True)
    await peer.nothing("send", QUIET)


@case
async def forbidden(stage: Stage) -> None:
    """What is forbidden is not repeated, and the application is told."""
    peer, send = await _asked(stage)
    await peer.error(send, "forbidden")
    await peer.told("failed", text="hello")
    await peer.nothing("send", QUIET)


@case
async def ack_moves_nothing(stage: Stage) -> None:
    """The ack of a message does not move the position: the event does."""
    peer, send = await _asked(stage)
    await peer.ack(send, room="general", epoch="e1", offset=9, ts=1)
    peer.abort()
    peer = await stage.arrival()
    await peer.resume(5)
