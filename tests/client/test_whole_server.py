"""The client on the server as it is run: two workers, which are killed; sessions, which are begun,
carried on and revoked through the control API."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from chatserver.client import (
    Client,
    Closed,
    DisconnectedError,
    Message,
    Open,
    Room,
    TokenKeeper,
    TokenPair,
    TokenRefusedError,
    Waiting,
    connect,
)
from tests.conftest import AMPLE
from tests.faults.nemesis import Theatre
from tests.faults.run import theatre
from tests.faults.server import tell
from tests.support.tokens import unique
from tests.support.worker import PATIENCE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACCESS_SECONDS = 10
"""The shortest that the server gives."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncIterator[Theatre]:
    async with theatre({**AMPLE, "access_seconds": ACCESS_SECONDS}) as stage:
        yield stage
        exit_code = await asyncio.to_thread(stage.server.stop)
        assert stage.server.untidy(exit_code) == []


class Drawer:
    """Where an application keeps its tokens."""

    def __init__(self, stage: Theatre) -> None:
        self.stage = stage
        self.pairs: list[TokenPair] = []

    async def save(self, pair: TokenPair) -> None:
        self.stage.server.issuer.keep(pair.access_token)
        self.stage.server.issuer.keep(pair.refresh_token)
        self.pairs.append(pair)

    async def keeper(self, user: str) -> TokenKeeper:
        answer = await self.stage.server.control("/v1/tokens", {"user": user})
        await self.save(TokenPair(**answer))
        return TokenKeeper(self.stage.server.url, self.pairs[-1], save=self.save)


def swift(stage: Theatre, user: str, **options: Any) -> Any:
    options = {"token": stage.server.issuer.token(user), "backoff": (0.2, 1.0)} | options
    return connect(stage.server.url, **options)


async def bodies(room: Room, count: int) -> list[object]:
    found: list[object] = []
    async with asyncio.timeout(4 * PATIENCE):
        async for event in room:
            assert isinstance(event, Message), event
            found.append(event.body)
            if len(found) == count:
                break
    return found


async def listen(room: Room, heard: list[object]) -> None:
    async for event in room:
        assert isinstance(event, Message), event
        heard.append(event.body)


async def test_killed_workers_cost_nobody_a_message(stage: Theatre) -> None:
    name, kills = unique("room"), 2
    sent = itertools.count()
    done = asyncio.Event()
    heard: list[object] = []

    async def talk(client: Client) -> None:
        for number in sent:
            await client.send(name, number)
            # Never so far ahead that the log would forget what somebody has yet to see.
            await eventually(lambda: number - len(heard) < 500, within=4 * PATIENCE)  # noqa: B023
            if done.is_set():
                return

    async with swift(stage, "alice") as alice, swift(stage, "bob") as bob:
        room = await bob.join(name)
        listening = asyncio.create_task(listen(room, heard))
        talking = asyncio.create_task(talk(alice))
        for slot in range(kills):
            pid = stage.server.worker(slot)
            assert pid is not None
            tell(pid, signal.SIGKILL)
            await stage.server.replaced(slot, pid)
        done.set()
        await talking
        total = next(sent)
        await eventually(lambda: len(heard) == total, within=4 * PATIENCE)
        listening.cancel()

    assert heard == list(range(len(heard)))
    assert len(heard) > 10


async def test_a_token_that_expires_is_replaced_unseen(stage: Theatre) -> None:
    drawer = Drawer(stage)
    states: list[object] = []
    keeper = await drawer.keeper(unique("carol"))
    async with swift(stage, "", token=keeper, on_state=states.append) as carol:
        room = await carol.join(unique("room"))
        first = carol.expires_at
        await eventually(lambda: carol.expires_at > first, within=ACCESS_SECONDS + PATIENCE)
        await room.send("still here")
        assert await bodies(room, 1) == ["still here"]

    assert [type(state) for state in states] == [Open, Closed]
    assert len(drawer.pairs) == 2
    assert keeper.pair == drawer.pairs[-1]


async def test_a_revoked_session_is_over_for_client_and_keeper(stage: Theatre) -> None:
    keeper = await Drawer(stage).keeper(unique("dave"))
    async with swift(stage, "", token=keeper) as dave:
        room = await dave.join(unique("room"))
        await stage.server.control("/v1/revocations", {"session": keeper.pair.session})
        with pytest.raises(DisconnectedError) as caught:
            async for _ in room:
                pass
        assert isinstance(dave.state, Closed)
        with pytest.raises(DisconnectedError):
            await room.send("anybody?")
    with pytest.raises(TokenRefusedError):
        await keeper()

    assert (caught.value.code, caught.value.reason) == (4503, "session_revoked")


async def test_a_logout_ends_the_session_everywhere(stage: Theatre) -> None:
    keeper = await Drawer(stage).keeper(unique("erin"))
    token = keeper.pair.access_token
    async with swift(stage, "", token=token) as here, swift(stage, "", token=token) as there:
        room = await there.join(unique("room"))
        await here.logout()
        with pytest.raises(DisconnectedError, match="4503"):
            await anext(room)

    assert here.state == Closed(None)


async def test_a_rolling_restart_is_waited_for_as_told(stage: Theatre) -> None:
    states: list[object] = []
    async with swift(stage, "frank", on_state=states.append) as frank:
        room = await frank.join(unique("room"))
        await stage.server.roll()
        await room.send("back")
        assert await bodies(room, 1) == ["back"]

    reasons = [state.why for state in states if isinstance(state, Waiting)]
    assert reasons
    assert all(isinstance(why, DisconnectedError) and why.code == 1012 for why in reasons)
