"""The scenarios: who is in which room, and what is done to them while the load is on."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from . import http
from .agenda import SECOND
from .tally import Measure

if TYPE_CHECKING:
    from .crowd import Crowd
    from .member import Member
    from .options import Options

CHAT_HISTORY, CHAT_MOVES = 0.1, 0.1
"""Of what clients do in ``chat``; the rest are messages."""
CHAT_ROOMS = 3
"""The most rooms of one client in ``chat``."""


class Scenario(NamedTuple):
    summary: str
    start: Callable[[Crowd, int], None]
    """Puts on the agenda what happens from this moment on."""
    rooms_of: Callable[[Options, int], list[str]]
    rooms: bool = True
    publishers: bool = True
    """Whether there are clients that only send."""
    share: float = 1.0
    """The default of --share."""
    fresh: bool = False
    """Whether clients need another token than the one they came with."""
    control: bool = False
    """Whether it needs the control API."""


def room_name(options: Options, number: int) -> str:
    return f"{options.run}-{number}"


def _nowhere(options: Options, index: int) -> list[str]:
    return []


def _one_of_all(options: Options, index: int) -> list[str]:
    return [room_name(options, index % options.rooms)]


def _some_of_many_sizes(options: Options, index: int) -> list[str]:
    """One to three rooms; the second is half as popular as the first, the third a third, …"""
    chance = random.Random(f"{options.run}-{index}")
    weights = list(accumulate(1 / (n + 1) for n in range(options.rooms)))
    drawn = chance.choices(range(options.rooms), cum_weights=weights, k=CHAT_ROOMS)
    return [room_name(options, n) for n in sorted(set(drawn[: chance.randint(1, CHAT_ROOMS)]))]


# -- what happens ----------------------------------------------------------------------------


def hold(crowd: Crowd, began: int) -> None:
    """Nothing: the connections stay."""


def publish(crowd: Crowd, began: int) -> None:
    """Messages at a rate, or as many as are acked."""
    options = crowd.options
    for publisher in crowd.publishers:
        number = publisher.index - options.clients
        room = room_name(options, number % options.rooms)
        if options.window:
            _keep_in_flight(publisher, room, options.window, began)
        else:
            crowd.agenda.every(
                began + int(number / options.rate * SECOND),
                int(options.publishers / options.rate * SECOND),
                partial(publisher.publish, room),
            )


def _keep_in_flight(publisher: Member, room: str, window: int, began: int) -> None:
    publisher.on_ack = partial(publisher.publish, room)
    for _ in range(window):
        publisher.publish(room, began)


def chat(crowd: Crowd, began: int) -> None:
    """Every client talks, goes from room to room and looks back, each at its own times."""
    options = crowd.options
    mean = options.clients / options.rate * SECOND
    chance = random.Random()

    def act(member: Member, due: int) -> None:
        again(member, due)
        room, drawn = chance.choice(member.rooms), chance.random()
        if drawn >= CHAT_HISTORY + CHAT_MOVES:
            member.publish(room, due)  # Who is away sends it when back.
        elif member.connection is None:
            pass
        elif drawn < CHAT_HISTORY:
            member.history(room, due)
        else:
            move(member, room, due)

    def move(member: Member, room: str, due: int) -> None:
        other = room_name(options, chance.randrange(options.rooms))
        if other not in member.rooms:
            member.part(room, due)
            member.rooms.append(other)
            member.join(other, due)

    def again(member: Member, due: int) -> None:
        # Independent users: the times between are exponential.
        crowd.agenda.at(due + int(chance.expovariate(1) * mean), partial(act, member))

    for member in crowd.members:
        again(member, began)


def refresh(crowd: Crowd, began: int) -> None:
    """Each socket gets a fresh token once, one after the other, under messages."""
    publish(crowd, began)
    for member in crowd.everyone:
        due = began + int(member.index / crowd.options.sockets * _length(crowd))
        crowd.agenda.at(due, partial(_spawn, crowd, member.refresh))


def reconnect(crowd: Crowd, began: int) -> None:
    """After a quarter of the time a share of the clients drops at once, under messages."""
    publish(crowd, began)

    def drop(due: int) -> None:
        for member in crowd.chosen():
            member.cut(due)

    crowd.agenda.at(began + _length(crowd) // 4, drop)


def revoke(crowd: Crowd, began: int) -> None:
    """The sessions of a share end, one after the other, under messages."""
    publish(crowd, began)
    for member in crowd.chosen():
        due = began + int(member.index / crowd.options.clients * _length(crowd))
        crowd.agenda.at(due, partial(_spawn, crowd, partial(_revoke, crowd, member)))


async def _revoke(crowd: Crowd, member: Member, due: int) -> None:
    """Through the control API; a handshake with the revoked token must then be refused."""
    if member.connection is None:
        return
    member.revoked_at = due
    why = {"session": member.session, "reason": "load test"}
    key = os.environ["CHATSERVER_CONTROL_KEY"]
    try:
        answer = await http.post(crowd.options.control, "/v1/revocations", key, why)
        failure = "" if answer.status == 200 else str(answer.status)
    except OSError:
        failure = "no_answer"
    if failure:
        crowd.tally.counts[f"error_control_{failure}"] += 1
        member.revoked_at = 0
        return
    crowd.tally.record(Measure.REVOKE_CALL, due, time.monotonic_ns())
    crowd.tally.counts["revoked"] += 1
    if await crowd.lets_in(member):
        crowd.tally.counts["accepted_after_revocation"] += 1


def slow(crowd: Crowd, began: int) -> None:
    """From a quarter to three quarters of the time a share does not read, under messages."""
    publish(crowd, began)
    stopped = crowd.chosen()

    def stop(due: int) -> None:
        for member in stopped:
            member.stop_reading()

    def go_on(due: int) -> None:
        for member in stopped:
            member.read_on()

    crowd.agenda.at(began + _length(crowd) // 4, stop)
    crowd.agenda.at(began + _length(crowd) * 3 // 4, go_on)


def _spawn(crowd: Crowd, work: Callable[[int], Coroutine[object, object, None]], due: int) -> None:
    crowd.spawn(work(due))


def _length(crowd: Crowd) -> int:
    return int(crowd.options.duration * SECOND)


SCENARIOS = {
    "connect": Scenario("ramp up to the number of clients, and hold", hold, _nowhere, False, False),
    "fanout": Scenario("publishers in rooms", publish, _one_of_all),
    "chat": Scenario(
        "rooms of many sizes, messages, joins, leaves, history",
        chat,
        _some_of_many_sizes,
        publishers=False,
    ),
    "refresh": Scenario(
        "every socket gets a fresh token in band", refresh, _one_of_all, fresh=True
    ),
    "reconnect": Scenario(
        "all or a share drop at once, and recover with fresh tokens",
        reconnect,
        _one_of_all,
        fresh=True,
    ),
    "revoke": Scenario(
        "sessions of a share are revoked", revoke, _one_of_all, share=0.1, control=True
    ),
    "slow": Scenario("a share stops reading for a while", slow, _one_of_all, share=0.1),
}
