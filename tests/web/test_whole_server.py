"""The JavaScript client with the server as it is run, and with what breaks it."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.faults import javascript
from tests.faults.checker import check
from tests.faults.clients import now
from tests.faults.history import Final, Mark, Received, Reset, Sent
from tests.faults.nemesis import Nemesis, Theatre
from tests.faults.run import theatre
from tests.support.worker import PATIENCE, end, eventually

NODE = shutil.which("node")
DICE = random.Random(3)
ROOM = "general"
LIFETIME = 5
"""Of an access token, in seconds."""

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")


async def conclude(stage: Theatre, members: list[javascript.Member]) -> list[str]:
    """Nobody writes any more: wait until everybody has everything, and have it checked."""
    stage.history.add(Mark(at=now(), name="quiet"))
    await eventually(lambda: all(m.settled and m.joined for m in members), "", 2 * PATIENCE)
    last = await members[0].end_of(ROOM)
    assert last is not None
    stage.history.add(Final(at=now(), room=ROOM, epoch=last.epoch, offset=last.offset))
    await eventually(lambda: all(m.reached(ROOM) == last.offset for m in members), "", PATIENCE)
    stage.history.add(Mark(at=now(), name="end"))
    return [str(violation) for violation in check(stage.history)]


async def test_nothing_is_lost_or_doubled_when_workers_and_store_die_and_tokens_run_out() -> None:
    async with theatre({}) as stage:
        members = [
            javascript.Member(stage.fleet, f"js-{n}", [ROOM], {ROOM: "rw"}, lifetime=LIFETIME)
            for n in range(6)
        ]
        tasks = [asyncio.create_task(member.run()) for member in members]
        try:
            await eventually(lambda: all(m.joined for m in members), "nobody came", 2 * PATIENCE)
            came_at = time.monotonic()
            writing = asyncio.create_task(_write(members))
            nemesis = Nemesis(stage)
            await nemesis.kill_worker(0, DICE)
            await nemesis.kill_store(1.0, DICE)
            await eventually(lambda: all(m.joined for m in members), "", 2 * PATIENCE)
            await nemesis.revoke(members[0].session)
            # Until nobody can live on the first token any more: the condition is the time itself.
            await asyncio.sleep(max(0.0, came_at + 1.5 * LIFETIME - time.monotonic()))
            await end([writing])
            violations = await conclude(stage, members)
        finally:
            for member in members:
                await member.leave()
            await asyncio.gather(*tasks)

    assert violations == []
    assert [member.strange for member in members if member.strange] == []
    sent = [record for record in stage.history if isinstance(record, Sent)]
    acked = [record for record in sent if record.outcome == "ok"]
    received = [record for record in stage.history if isinstance(record, Received)]
    assert len(acked) > 0.9 * len(sent) > 50
    assert len(received) >= 5 * len(acked)
    assert not any(isinstance(record, Reset) for record in stage.history)
    assert stage.fleet.counts["end 4503"] == 1


async def _write(members: list[javascript.Member]) -> None:
    while True:
        DICE.choice(members).publish([ROOM])
        await asyncio.sleep(0.05)


async def test_a_session_is_kept_fresh_until_it_is_ended(tmp_path: Path) -> None:
    async with theatre({}) as stage:
        pair = await stage.server.control("/v1/tokens", {"user": "alice"})
        process = await asyncio.create_subprocess_exec(
            str(NODE),
            "--experimental-websocket",
            "--no-warnings",
            str(Path(__file__).with_name("session.mjs")),
            stage.server.url,
            json.dumps(pair),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(2 * PATIENCE):
            out, err = await process.communicate()

    assert err == b""
    assert [json.loads(line) for line in out.splitlines()] == [
        {"refreshed": True, "same": True},
        {"event": "message", "user": "alice", "key": "k", "offset": 1},
        {"sent": 1, "end": 1},
        {"state": "closed", "why": None},
        {"refused": True, "code": "token_revoked"},
        {"status": 401, "code": "token_revoked"},
    ]
