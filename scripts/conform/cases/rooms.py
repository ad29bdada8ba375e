"""Positions: nothing twice, nothing missing, and told where that cannot be proven."""

from __future__ import annotations

import time

from conform.cases import case
from conform.peer import Broken, Peer
from conform.stage import Stage

QUIET = 1.5
"""Seconds in which a client would have done what it should not."""


async def _settled(peer: Peer, offset: int) -> None:
    """Whatever was said before this has been read: the program answers what comes last."""
    await peer.ask(offset, "read")
    await peer.sent("read")


async def _comes_back(stage: Stage, peer: Peer, offset: int, epoch: str = "e1") -> Peer:
    """It goes on from this position on the next connection."""
    peer.abort()
    peer = await stage.arrival()
    await peer.resume(offset, epoch)
    return peer


@case
async def duplicate(stage: Stage) -> None:
    """An event at or before the position is dropped."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.ask(5, "five")
    await peer.store(await peer.sent("five"), 6)
    await peer.ask(6, "six again")
    await peer.ask(5, "five again")
    await peer.ask(3, "three, which is old")
    await _settled(peer, 7)


@case
async def skipped(stage: Stage) -> None:
    """A skip moves the position, and so does an event of a type that is not known."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.say("skip", room="general", offset=5)
    await peer.say("of_a_later_version", room="general", offset=6, color="blue")
    await peer.ask(7, "seven")
    await peer.sent("seven")
    await peer.nothing("join", QUIET)
    await _comes_back(stage, peer, 7)


@case
async def ephemeral(stage: Stage) -> None:
    """What has no offset moves nothing, and what is not known is ignored."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.say("typing", room="general", user="bob")
    await peer.say("weather", sun=True)
    await peer.say("of_a_later_version", room="elsewhere", offset=70)
    await peer.message(5, {"text": "with a field of a later version"})
    await _settled(peer, 6)
    await _comes_back(stage, peer, 6)


@case
async def hole(stage: Stage) -> None:
    """Where events are missing it joins with since, and drops the room's until the ack."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.message(5)
    await peer.ask(8, "eight, too early")
    await peer.ask(6, "six, while dropping")
    join = await peer.expect("join", room="general")
    peer.goes_on_from(join, "e1", 5)
    await peer.ask(9, "nine, too early")
    await peer.ack(
        join, room="general", epoch="e1", offset=9, rights="rw", replay=4, recovered=True
    )
    for offset in (6, 7, 8, 9):
        await peer.ask(offset, f"replayed {offset}")
    for offset in (6, 7, 8, 9):
        send = await peer.sent(f"replayed {offset}")
        await peer.ack(send, room="general", epoch="e1", offset=offset + 4, ts=1)
    await _comes_back(stage, peer, 9)


@case
async def hole_refused_for_now(stage: Stage) -> None:
    """A join that is refused for now is repeated: after retry_after, if that is given."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.message(6)
    told = await peer.error(await peer.expect("join"), "rate_limited", retry_after=1000)
    join = await peer.expect("join")
    waited = time.monotonic() - told
    if waited < 0.95:
        raise Broken(f"it asked again after {waited:.2f} s, and was told 1")
    await peer.error(join, "unavailable")
    join = await peer.expect("join")
    peer.goes_on_from(join, "e1", 4)


@case
async def join_unavailable(stage: Stage) -> None:
    """A first join that is answered unavailable is repeated."""
    peer = await stage.arrival()
    await peer.welcome()
    await peer.error(await peer.expect("join"), "unavailable")
    await peer.admit(4)
    await _settled(peer, 5)


@case
async def join_forbidden(stage: Stage) -> None:
    """A join that is forbidden is not repeated."""
    peer = await stage.arrival()
    await peer.welcome()
    await peer.error(await peer.expect("join"), "forbidden")
    await peer.nothing("join", 3)


@case
async def epoch(stage: Stage) -> None:
    """A new epoch keeps the offset."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.say("epoch", room="general", epoch="e2")
    await peer.ask(5, "five")
    await peer.sent("five")
    await _comes_back(stage, peer, 5, "e2")


@case
async def reset(stage: Stage) -> None:
    """A reset sets both, also to what is lower, and the application is told."""
    peer = await stage.arrival()
    await peer.begin(offset=40)
    await peer.say("reset", room="general", epoch="e2", offset=2)
    await peer.told("gap")
    await peer.ask(3, "three")
    await peer.sent("three")
    await _comes_back(stage, peer, 3, "e2")


@case
async def not_recovered(stage: Stage) -> None:
    """recovered:false is told to the application, with the gap, and the ack's position counts."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    peer.abort()
    peer = await stage.arrival()
    await peer.welcome()
    gap = {"from": 5, "to": 8}
    join = await peer.admit(10, replay=2, recovered=False, gap=gap)
    peer.goes_on_from(join, "e1", 4)
    await peer.ask(9, "nine")
    await peer.message(10)
    await peer.told("gap", first=5, last=8)
    await peer.sent("nine")
    await _comes_back(stage, peer, 10)


@case
async def moved_back(stage: Stage) -> None:
    """An ack of a join may lie before the position: what follows it is new."""
    peer = await stage.arrival()
    await peer.begin(offset=40)
    peer.abort()
    peer = await stage.arrival()
    await peer.welcome()
    await peer.admit(3, epoch="e2", replay=1, recovered=False)
    await peer.ask(3, "three")
    await peer.told("gap")
    await peer.sent("three")
    await _comes_back(stage, peer, 3, "e2")


@case
async def all_rooms_at_once(stage: Stage) -> None:
    """It joins every room again without waiting for the answers in between."""
    rooms = [f"room-{n}" for n in range(20)]
    peer = await stage.arrival()
    await peer.begin(offset=4)
    for offset, room in enumerate(rooms, 5):
        await peer.message(offset, {"do": "join", "room": room})
        await peer.admit(offset, room=room, epoch="r1")
    peer.abort()
    peer = await stage.arrival()
    await peer.welcome()
    joins = {}
    for _ in ["general", *rooms]:
        join = await peer.expect("join")
        joins[join["room"]] = join.get("since")
    wanted = {room: {"epoch": "r1", "offset": offset} for offset, room in enumerate(rooms, 5)}
    wanted["general"] = {"epoch": "e1", "offset": 24}
    if joins != wanted:
        raise Broken(f"it came back with {joins}, and not with {wanted}")


@case
async def left(stage: Stage) -> None:
    """Whom the server made leave does not join again, and the application is told."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.say("left", room="general", reason="kicked")
    await peer.told("left", reason="kicked")
    peer.abort()
    peer = await stage.arrival()
    await peer.welcome()
    await peer.nothing("join", QUIET)


@case
async def left_by_refresh(stage: Stage) -> None:
    """A room named in left of a refresh is over, though no event says so."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.expiring(now=True)
    await peer.refresh("general")
    await peer.told("left")
    peer.abort()
    peer = await stage.arrival()
    await peer.welcome()
    await peer.nothing("join", QUIET)


@case
async def leave(stage: Stage) -> None:
    """A room that was left is not joined again."""
    peer = await stage.arrival()
    await peer.begin(offset=4)
    await peer.message(5, {"do": "leave"})
    await peer.ack(await peer.expect("leave", room="general"), room="general")
    peer.abort()
    peer = await stage.arrival()
    await peer.welcome()
    await peer.nothing("join", QUIET)
