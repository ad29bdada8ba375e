"""A token's life: refreshed in time, traded once, saved before it is used."""

from __future__ import annotations

from conform.cases import case
from conform.peer import Broken
from conform.stage import Lost, Stage, refuse

QUIET = 2.0
LEEWAY = 9.5
"""Seconds in which an answer that was lost is given again; the server's own are 10."""


@case
async def refresh_in_time(stage: Stage) -> None:
    """Told expiring, however often, it makes one trade and one refresh, and stays connected."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    for _ in range(3):
        await peer.expiring()
    await peer.renew()
    await peer.nothing("refresh", QUIET)
    if len(stage.trades) > 1:
        raise Broken(f"it made {len(stage.trades)} trades for one refresh")
    await stage.nobody(0, after=1)
    await peer.ask(5, "here")
    await peer.sent("here")


@case
async def rights_changed(stage: Stage) -> None:
    """Told expiring with now, it trades at once, however fresh its token is."""
    peer = await stage.arrival()
    await peer.begin()
    await peer.expiring(now=True)
    await peer.renew()
    await peer.expiring(now=True)
    await peer.renew()


@case
async def rights_changed_while_refreshing(stage: Stage) -> None:
    """A change of rights after a trade began needs another one."""
    peer = await stage.arrival()
    await peer.begin()
    await peer.expiring()
    await stage.traded(1)
    await peer.expiring(now=True)
    if (await peer.refresh())["token"] == "access-2":
        await peer.refresh()
    if len(stage.trades) < 2:
        raise Broken("it made no trade after the rights changed")


@case
async def refresh_refused_for_now(stage: Stage) -> None:
    """A refresh answered unavailable is repeated on the same connection."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.expiring()
    await peer.error(await peer.expect("refresh"), "unavailable")
    await peer.renew()


@case
async def expired_commands(stage: Stage) -> None:
    """A message refused with token_expired is sent again once the token is a new one."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.ask(5, "hello")
    send = await peer.sent("hello")
    await peer.expiring()
    await peer.error(send, "token_expired")
    await peer.renew()
    again = await peer.sent("hello")
    if again["key"] != send["key"]:
        raise Broken("it repeated a message under another key")
    await peer.store(again, 6)


@case
async def saved_before_used(stage: Stage) -> None:
    """A new pair is saved before its access token is used."""
    stage.must_save = True
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.expiring()
    await peer.renew()
    stage.expire()
    await peer.bye(4401, "token_expired")
    await stage.arrival()


@case
async def trade_without_an_answer(stage: Stage) -> None:
    """A refresh token whose answer was lost is presented again, within the leeway."""
    stage.fates.extend([Lost(), Lost()])
    peer = await stage.arrival()
    await peer.begin()
    await peer.expiring()
    third = await stage.traded(3, 15)
    waited = third.at - stage.trades[0].at
    if waited > LEEWAY:
        raise Broken(f"it asked for the lost answer after {waited:.1f} s: the leeway is 10")
    await peer.renew()


@case
async def trade_503(stage: Stage) -> None:
    """A trade refused for now is repeated with the same token, after Retry-After."""
    await _again(stage, 503, "unavailable")


@case
async def trade_429(stage: Stage) -> None:
    """A trade that came too often is repeated with the same token, after Retry-After."""
    await _again(stage, 429, "rate_limited")


async def _again(stage: Stage, status: int, code: str) -> None:
    stage.fates.append(refuse(status, code, Retry_After="2"))
    peer = await stage.arrival()
    await peer.begin()
    await peer.expiring()
    second = await stage.traded(2, 15)
    waited = second.at - stage.trades[0].at
    if waited < 1.95:
        raise Broken(f"it asked again after {waited:.2f} s, and was told 2")
    await peer.renew()


@case
async def trade_refused(stage: Stage) -> None:
    """A refresh token that was refused with 401 is never presented again."""
    stage.fates.extend([refuse(401, "token_revoked")] * 9)
    peer = await stage.arrival()
    await peer.begin()
    await peer.expiring()
    await stage.traded(1)
    await stage.nobody(4)
    stage.expire()
    peer.abort()
    try:
        await stage.traded(2, 4)
    except Broken:
        return
    raise Broken("it presented a refresh token again that had been refused")
