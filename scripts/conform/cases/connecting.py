"""Coming, going, and coming back."""

from __future__ import annotations

import asyncio

from conform.cases import CASES, case
from conform.peer import Broken
from conform.stage import Stage, answer, refuse

SLACK = 1.5
"""Seconds that a slow machine may need beyond a wait."""
AWAY = 4.0
"""Who has not come back by then stays away: the first wait is a second at most."""
TIMER = 0.05
"""A timer may be early by so much."""


@case
async def first_connection(stage: Stage) -> None:
    """It brings its token, joins, takes events and sends with random keys."""
    peer = await stage.arrival()
    stage.newest(peer.token)
    await peer.begin(offset=4)
    await peer.ask(5, "one")
    one = await peer.sent("one")
    await peer.store(one, 6)
    await peer.ask(7, "one")
    again = await peer.sent("one")
    if one["key"] == again["key"]:
        raise Broken("two messages had the same key")
    await peer.store(again, 8)


@case
async def slow_welcome(stage: Stage) -> None:
    """It says nothing before the welcome, and waits for it."""
    peer = await stage.arrival()
    await stage.nobody(3)
    await peer.begin()
    await peer.ask(5, "here")
    await peer.sent("here")


@case
async def drain(stage: Stage) -> None:
    """It comes back after bye.after, to where it was."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.ask(5, "here")
    await peer.store(await peer.sent("here"), 6)
    told = await peer.bye(1012, "draining", after=1500)
    peer = await stage.arrival(1.5 + SLACK)
    if peer.at - told < 1.5 - TIMER:
        raise Broken(f"it came back after {peer.at - told:.2f} s, and was told 1.5")
    await peer.resume(6)


@case
async def full_jitter(stage: Stage) -> None:
    """It waits a random time up to 1, 2, 4, 8 seconds, as long as nothing else is said."""
    lost = (await stage.arrival()).abort()
    shares = []
    for attempt in range(4):
        limit = 2.0**attempt
        peer = await stage.arrival(limit + SLACK)
        shares.append((peer.at - lost) / limit)
        lost = peer.abort()
    if max(shares) < 0.1:
        raise Broken("it hammers: there was hardly a wait")
    if min(shares) > 0.9:
        raise Broken("it always waits as long as it may: a crowd would come back as one")


@case
async def codes_to_come_back_after(stage: Stage) -> None:
    """It comes back after 1001, 1009, 1011, 1013, 4408, 4429 and 4430."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    for code, reason in [
        (1001, "going away"),
        (1009, "message too big"),
        (1011, "server error"),
        (1013, "overloaded"),
        (4408, "no_pong"),
        (4429, "rate_limited"),
        (4430, "slow_consumer"),
    ]:
        await peer.bye(code, reason, after=100)
        peer = await stage.arrival()
        await peer.resume(4)


@case
async def nobody_there(stage: Stage) -> None:
    """It goes on trying while the server cannot be reached."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    stage.cut = True
    peer.abort()
    await asyncio.sleep(3)
    stage.cut = False
    peer = await stage.arrival(8 + SLACK)
    await peer.resume(4)


@case
async def dead_link(stage: Stage) -> None:
    """It finds out that nobody answers any more, though the connection stands."""
    peer = await stage.arrival()
    await peer.begin(offset=4, ping_interval=1000)
    peer.freeze()
    peer = await stage.arrival(30)
    await peer.resume(4)


@case
async def refused_401_expired(stage: Stage) -> None:
    """A handshake refused with token_expired is repeated with a new token."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    stage.expire()
    peer.abort()
    peer = await stage.arrival()
    stage.newest(peer.token)
    await peer.resume(4)


@case
async def refused_401_revoked(stage: Stage) -> None:
    """A token refused with token_revoked is not shown again; a second one so refused is the end."""
    peer = await stage.arrival()
    await peer.begin()
    stage.refusals.extend([refuse(401, "token_revoked")] * 9)
    peer.abort()
    await stage.tried(2, 1 + SLACK)
    # Another one may be good: a token can be revoked by its id while its session lives.
    await stage.nobody(AWAY, after=3)
    tokens = [handshake.token for handshake in stage.handshakes[1:]]
    if len(set(tokens)) < len(tokens):
        raise Broken("it showed a token again that had been refused")


@case
async def refused_403(stage: Stage) -> None:
    """A handshake refused with 403 is the end: an origin does not change."""
    stage.refusals.extend([refuse(403, "origin_denied")] * 9)
    await stage.tried(1, 20)
    await stage.nobody(AWAY)


@case
async def refused_429(stage: Stage) -> None:
    """Retry-After of a 429 is waited for."""
    await _wait_told(stage, 429, "rate_limited")


@case
async def refused_503(stage: Stage) -> None:
    """Retry-After of a 503 is waited for."""
    await _wait_told(stage, 503, "draining")


async def _wait_told(stage: Stage, status: int, code: str) -> None:
    peer = await stage.arrival()
    await peer.begin(offset=4)
    stage.refusals.append(refuse(status, code, Retry_After="3"))
    peer.abort()
    await stage.tried(2, 1 + SLACK)
    peer = await stage.arrival(3 + 2 + SLACK)
    waited = peer.at - stage.handshakes[1].at
    if waited < 3 - TIMER:
        raise Broken(f"it came back after {waited:.2f} s, and was told 3")
    await peer.resume(4)


@case
async def refused_by_a_proxy(stage: Stage) -> None:
    """A 502 or 504, which is a proxy's, is a restart: it goes on trying."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    stage.refusals.extend([answer(502, "Bad Gateway"), answer(504, "Gateway Timeout")])
    peer.abort()
    peer = await stage.arrival(1 + 2 + 4 + SLACK)
    await peer.resume(4)


@case
async def expired_4401(stage: Stage) -> None:
    """After 4401 it gets a new token before it comes back."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    stage.expire()
    await peer.bye(4401, "token_expired")
    peer = await stage.arrival()
    stage.newest(peer.token)
    await peer.resume(4)
    if len(stage.handshakes) > 2:
        raise Broken("it tried with the old token first")


@case
async def logout(stage: Stage) -> None:
    """After a logout it stays away."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.message(5, {"do": "logout"})
    await peer.ack(await peer.expect("logout"))
    await peer.bye(4503, "session_revoked")
    await stage.nobody(AWAY)


def _final(code: int, reason: str) -> None:
    async def play(stage: Stage) -> None:
        peer = await stage.arrival()
        await peer.begin()
        await peer.bye(code, reason)
        await stage.nobody(AWAY)

    play.__doc__ = f"{code} {reason} is final: it stays away."
    CASES[f"final_{code}"] = play


_final(4500, "bad_frame")
_final(4501, "token_invalid")
_final(4503, "session_revoked")
_final(4504, "banned")
_final(4505, "superseded")
_final(4599, "of_a_later_version")


def _own_fault(code: int) -> None:
    async def play(stage: Stage) -> None:
        for attempt in range(3):
            try:
                peer = await stage.arrival(2.0**attempt + SLACK)
            except Broken:
                if attempt == 0:
                    raise
                return  # It gave up even earlier.
            await peer.welcome()
            await peer.close(code)
        try:
            await stage.nobody(4 + SLACK, after=3)
        except Broken:
            raise Broken(f"it came a fourth time after {code}, which is its own fault") from None

    play.__doc__ = f"{code} is its own fault: three tries at most."
    CASES[f"own_fault_{code}"] = play


_own_fault(1002)
_own_fault(1007)
