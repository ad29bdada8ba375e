"""The revocation list and its mirror against a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from chatserver.core.claims import Identity
from chatserver.core.errors import StoreUnavailable
from chatserver.core.session import REVOCATION_SECONDS, STALE_SECONDS, Kind, Revocation
from chatserver.store import revocations
from chatserver.store.keys import CHANNEL, STREAM
from chatserver.store.link import Done, Lane, Store
from chatserver.store.revocations import Mirror, cutoff, revoke
from chatserver.store.topology import Argument
from tests.support.tokens import unique
from tests.support.valkey import Valkey
from tests.support.worker import end, eventually


def identity(
    *, user: str = "someone", session: str = "any", token_id: str = "one", issued_at: int = 0
) -> Identity:
    return Identity(
        user=user,
        session=session,
        token_id=token_id,
        roles=("member",),
        rooms=None,
        issued_at=issued_at,
        expires_at=issued_at + 900,
    )


class Idle:
    """A worker with nobody on it."""

    def revoke(self, revocation: Revocation) -> int:
        return 0

    def rights_changed(self, session: str) -> None: ...

    def lease_lapsed(self) -> None: ...

    def about(self) -> dict[str, object]:
        return {}


class Mirrors(Idle):
    """A store, a mirror of it that runs, and what the mirror told."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.told: list[Revocation] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.store = Store(url)
        self.lane = self.store.lane()
        self.mirror = Mirror(self.lane, unique("w"), self)
        subscription = self.store.subscription(
            lambda name, payload: self.mirror.wake(), lambda name: self.mirror.wake()
        )
        subscription.subscribe(CHANNEL)
        self.tasks = [
            asyncio.create_task(run()) for run in (self.lane.run, subscription.run, self.mirror.run)
        ]

    def revoke(self, revocation: Revocation) -> int:
        self.told.append(revocation)
        return 0

    async def close(self) -> None:
        ended = [task for task in self.tasks if task.done()]
        await end(self.tasks)
        assert not ended, ended

    async def end(self, kind: Kind, value: str) -> None:
        async with Store(self.url) as store:
            await revoke(store.call, kind, value)


@pytest.fixture
async def mirrors(valkey: Valkey) -> AsyncIterator[Mirrors]:
    opened = Mirrors(valkey.url)
    await eventually(opened.mirror.fresh)
    yield opened
    await opened.close()


@pytest.fixture
async def own(own_valkey: Valkey) -> AsyncIterator[Mirrors]:
    opened = Mirrors(own_valkey.url)
    await eventually(opened.mirror.fresh)
    yield opened
    await opened.close()


@pytest.fixture
async def second(own: Mirrors) -> AsyncIterator[Mirrors]:
    """Another worker's mirror of the same store."""
    opened = Mirrors(own.url)
    await eventually(opened.mirror.fresh)
    yield opened
    await opened.close()


# --- what is written -----------------------------------------------------------------------


async def test_a_revoked_session_is_a_key_that_anyone_can_check(
    mirrors: Mirrors, valkey: Valkey
) -> None:
    session = unique("s")
    key = f"chat:{{auth}}:revoked:session:{session}"

    await mirrors.end(Kind.SESSION, session)

    assert valkey.command("EXISTS", key) == b":1"
    assert REVOCATION_SECONDS - 5 <= int(valkey.command("TTL", key)[1:]) <= REVOCATION_SECONDS
    assert REVOCATION_SECONDS >= 900


async def test_a_users_record_holds_the_cutoff_in_seconds_of_the_stores_clock(
    mirrors: Mirrors, valkey: Valkey
) -> None:
    user = unique("u")
    before = int(time.time())
    async with Store(valkey.url) as store:
        assert await cutoff(store.call, user) == 0
        await revoke(store.call, Kind.USER, user)
        at = await cutoff(store.call, user)

    assert before <= at <= int(time.time())


async def test_the_stream_ends_by_itself(mirrors: Mirrors, valkey: Valkey) -> None:
    await mirrors.end(Kind.TOKEN, unique("t"))

    left = int(valkey.command("PTTL", STREAM)[1:])
    assert REVOCATION_SECONDS * 1000 < left <= 20 * 60 * 1000


async def test_revoking_in_a_store_that_is_away_says_so(own: Mirrors, own_valkey: Valkey) -> None:
    async with Store(own_valkey.url) as store:
        own_valkey.kill()
        with pytest.raises(StoreUnavailable):
            await revoke(store.call, Kind.SESSION, "s")


# --- what is mirrored ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field"), [(Kind.SESSION, "session"), (Kind.TOKEN, "token_id"), (Kind.USER, "user")]
)
async def test_a_revocation_is_applied_and_told_once(
    mirrors: Mirrors, kind: Kind, field: str
) -> None:
    value = unique("v")
    someone: Any = {field: value}
    assert not mirrors.mirror.covers(identity(**someone))

    await mirrors.end(kind, value)
    await eventually(lambda: mirrors.mirror.covers(identity(**someone)))

    told = [revocation for revocation in mirrors.told if revocation.value == value]
    assert [revocation.kind for revocation in told] == [kind]
    assert not mirrors.mirror.covers(identity(**{field: value + "x"}))  # type: ignore[arg-type]


async def test_it_arrives_by_the_beat_alone(own_valkey: Valkey) -> None:
    """Pub/sub may lose the message that wakes the mirror."""
    store = Store(own_valkey.url)
    lane = store.lane()
    mirror = Mirror(lane, "w", Idle())
    tasks = [asyncio.create_task(run()) for run in (lane.run, mirror.run)]
    await eventually(mirror.fresh)

    async with Store(own_valkey.url) as other:
        await revoke(other.call, Kind.SESSION, "s")
    await eventually(lambda: mirror.covers(identity(session="s")))

    await end(tasks)


async def test_a_new_mirror_knows_all_that_was_revoked_before(own: Mirrors) -> None:
    """More than one read of the stream holds, in order."""
    count = revocations.POLL_ENTRIES * 2 + 5
    for n in range(count):
        own.lane.submit(
            revocations._revoke_command(Kind.SESSION, f"s{n}", 100, ""), lambda reply: None
        )
    await own.lane.call(["PING"])

    late = Mirrors(own.url)
    await eventually(late.mirror.fresh)
    try:
        assert all(late.mirror.covers(identity(session=f"s{n}")) for n in range(count))
        assert len(late.told) == count
    finally:
        await late.close()


async def test_a_cutoff_never_goes_back(own: Mirrors, own_valkey: Valkey) -> None:
    """An older entry that is written back must not reopen what was closed since."""
    await own.end(Kind.USER, "u")
    await eventually(lambda: own.told)
    at = own.told[-1].cutoff

    await own.lane.call(revocations._revoke_command(Kind.USER, "u", 60, at - 500))
    record = own_valkey.command("GET", "chat:{auth}:revoked:user:u")
    left = int(own_valkey.command("TTL", "chat:{auth}:revoked:user:u")[1:])
    late = Mirrors(own.url)
    await eventually(late.mirror.fresh)
    await late.close()

    assert int(record) == at
    assert left > 60
    for mirror in (own.mirror, late.mirror):
        assert mirror.covers(identity(user="u", issued_at=at))
        assert not mirror.covers(identity(user="u", issued_at=at + 1))


async def test_an_entry_is_forgotten_when_its_time_is_over(own: Mirrors) -> None:
    await own.lane.call(revocations._revoke_command(Kind.SESSION, "brief", 1, ""))
    await own.lane.call(revocations._revoke_command(Kind.SESSION, "long", 100, ""))
    await eventually(lambda: own.mirror.covers(identity(session="long")))

    await eventually(lambda: not own.mirror.covers(identity(session="brief")))

    assert own.mirror.covers(identity(session="long"))


GARBAGE: list[list[str | bytes]] = [
    ["nonsense", "1"],
    ["kind", "session"],
    ["kind", "nobody", "value", "x", "until", "1", "cutoff", "0"],
    ["kind", "session", "value", "x", "until", "soon", "cutoff", "0"],
    ["kind", "session", "value", "x", "until", "99999999999", "cutoff", "1.5"],
    ["kind", "session", "value", b"\xff\xfe", "until", "99999999999", "cutoff", "0"],
    ["kind", "session", "value", "x", "until", "99999999999", "cutoff", "9" * 5000],
    ["kind", "session", "value", "inf", "until", "inf", "cutoff", "0"],
    ["kind", "session", "value", "nan", "until", "nan", "cutoff", "0"],
    ["kind", "session", "value", "far", "until", "1e300", "cutoff", "0"],
    ["kind", "user", "value", "far", "until", "99999999999", "cutoff", "9" * 40],
]


async def test_garbage_in_the_stream_and_on_the_channel_is_ignored(
    own: Mirrors, own_valkey: Valkey
) -> None:
    """Even when all that is known has to be written back to an emptied store."""
    for fields in GARBAGE:
        own_valkey.command("XADD", STREAM, "*", *fields)
    for payload in (b"", b"\xff", b"0-0", b"x" * 100_000):
        own_valkey.command("PUBLISH", CHANNEL, payload)
    await own.end(Kind.SESSION, "s")
    await eventually(lambda: own.mirror.covers(identity(session="s")))

    own_valkey.command("FLUSHALL")
    own.mirror.wake()
    key = "chat:{auth}:revoked:session:s"
    await eventually(lambda: own_valkey.command("EXISTS", key) == b":1")
    await own.end(Kind.SESSION, "s2")
    await eventually(lambda: own.mirror.covers(identity(session="s2")))

    assert own.mirror.fresh()


# --- whether it may be believed ------------------------------------------------------------


async def test_a_mirror_is_not_believed_before_its_first_look(own_valkey: Valkey) -> None:
    mirror = Mirror(Store(own_valkey.url).lane(), "w", Idle())

    assert not mirror.fresh()


async def test_a_mirror_of_a_frozen_store_grows_stale_and_recovers(
    own: Mirrors, own_valkey: Valkey
) -> None:
    own_valkey.freeze()
    believed_at = time.monotonic()

    def stale() -> bool:
        nonlocal believed_at
        now = time.monotonic()
        if own.mirror.fresh():
            believed_at = now
            return False
        return True

    await eventually(stale)
    confirmed_at, stale_at = own.mirror._confirmed_at, time.monotonic()
    own_valkey.thaw()
    await eventually(own.mirror.fresh)

    assert believed_at < confirmed_at + STALE_SECONDS <= stale_at


async def test_an_answer_from_before_a_pause_is_not_taken_for_a_new_one(
    own: Mirrors, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped between question and answer wakes up with an old answer."""
    asked: list[float] = []
    submit = own.lane.submit

    def stopped(command: list[Argument], done: Done) -> None:
        def wake_up(reply: Any) -> None:
            asked.append(time.monotonic())
            jump = len(asked) * 10.0
            monkeypatch.setattr(revocations, "time", _Later(jump))
            done(reply)

        submit(command, wake_up)

    monkeypatch.setattr(own.lane, "submit", stopped)
    own.mirror.wake()
    await eventually(lambda: len(asked) >= 2)

    assert not own.mirror.fresh()


class _Later:
    """The time module, some seconds on by the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def monotonic(self) -> float:
        return time.monotonic() + self._seconds

    def time(self) -> float:
        return time.time()


class _Skewed(_Later):
    """The time module with a wall clock that is wrong."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time() + self._seconds


@pytest.mark.parametrize("seconds", [-1200.0, -7.0, 7.0, 1200.0])
async def test_with_a_clock_far_from_the_stores_nothing_is_accepted(
    own: Mirrors, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(revocations, "time", _Skewed(seconds))
    own.mirror.wake()
    await eventually(lambda: not own.mirror.fresh())

    monkeypatch.setattr(revocations, "time", _Skewed(0.5))
    own.mirror.wake()
    await eventually(own.mirror.fresh)


async def test_what_an_emptied_store_forgot_is_written_back(
    own: Mirrors, second: Mirrors, own_valkey: Valkey
) -> None:
    await own.end(Kind.SESSION, "s")
    await own.end(Kind.USER, "u")
    await eventually(lambda: len(own.told) == len(second.told) == 2)
    at = own.told[-1].cutoff

    own_valkey.command("FLUSHALL")
    keys = ["chat:{auth}:revoked:session:s", "chat:{auth}:revoked:user:u"]
    await eventually(lambda: own_valkey.command("EXISTS", *keys) == b":2")
    late = Mirrors(own.url)
    await eventually(late.mirror.fresh)
    await eventually(lambda: late.mirror.covers(identity(session="s")))
    await late.close()

    for known in (own, second, late):
        assert known.mirror.covers(identity(session="s"))
        assert known.mirror.covers(identity(user="u", issued_at=at))
        assert not known.mirror.covers(identity(user="u", issued_at=at + 1))
    for told in (own.told, second.told):
        # One that took a second to be written back ends a second later, which is news.
        assert len({(each.kind, each.value, each.cutoff) for each in told}) == 2
        assert len(set(told)) == len(told)
    assert int(own_valkey.command("TTL", keys[0])[1:]) > REVOCATION_SECONDS - 60


async def test_an_older_copy_of_the_store_gets_back_what_it_lacks(
    own: Mirrors, own_valkey: Valkey
) -> None:
    """Also when it has a later entry by then: as after a failover to a replica that was behind."""
    await own.end(Kind.SESSION, "old")
    with own_valkey.older_copy() as put_back:
        await own.end(Kind.SESSION, "lost")
        await own.end(Kind.USER, "u")
        await eventually(lambda: len(own.told) == 3)
        at = own.told[-1].cutoff
        following = own.tasks.pop()
        await end([following])
        put_back()
    await own.end(Kind.SESSION, "later")
    own.tasks.append(asyncio.create_task(own.mirror.run()))
    keys = ["chat:{auth}:revoked:session:lost", "chat:{auth}:revoked:user:u"]
    await eventually(lambda: own_valkey.command("EXISTS", *keys) == b":2")
    fresh = Mirrors(own.url)
    await eventually(lambda: fresh.mirror.covers(identity(user="u", issued_at=at)))
    await fresh.close()

    for known in (own, fresh):
        for session in ("old", "lost", "later"):
            assert known.mirror.covers(identity(session=session))
        assert not known.mirror.covers(identity(user="u", issued_at=at + 1))
    # Nothing that it had is written again: one entry each.
    assert own_valkey.command("XLEN", STREAM) == b":4"


async def test_a_mirror_reads_all_again_when_the_stores_history_forked(
    own: Mirrors, own_valkey: Valkey
) -> None:
    """What the other branch had before this one's last entry is not to be missed."""
    await own.end(Kind.SESSION, "mine")
    await eventually(lambda: own.mirror.covers(identity(session="mine")))
    entry = ["kind", "session", "cutoff", "0", "until", "9999999999", "value"]
    following = own.tasks.pop()
    await end([following])
    own_valkey.command("DEL", STREAM)
    own_valkey.command("XADD", STREAM, "1-1", *entry, "theirs")
    own_valkey.command("XADD", STREAM, "9999999999999-1", *entry, "later")
    own_valkey.restart()
    own.tasks.append(asyncio.create_task(own.mirror.run()))

    await eventually(lambda: own.mirror.covers(identity(session="theirs")))


class _Failing(Lane):
    """Fails the command that ``when`` picks, once."""

    when: Callable[[list[Argument]], bool] | None = None

    def submit(
        self,
        command: list[Argument],
        done: Done,
        wanted: Callable[[], bool] | None = None,
        weight: int = 1,
    ) -> None:
        if self.when is not None and self.when(command):
            self.when = None
            asyncio.get_running_loop().call_soon(done, StoreUnavailable("for the test"))
            return
        super().submit(command, done, wanted, weight)


async def test_writing_back_that_failed_half_way_is_done_again(own_valkey: Valkey) -> None:
    store = Store(own_valkey.url)
    lane = _Failing(store._place, batch=16)
    mirror = Mirror(lane, "w", Idle())
    tasks = [asyncio.create_task(run()) for run in (lane.run, mirror.run)]
    await eventually(mirror.fresh)
    names = [f"s{n}" for n in range(5)]
    async with Store(own_valkey.url) as other:
        for name in names:
            await revoke(other.call, Kind.SESSION, name)
    await eventually(lambda: mirror.covers(identity(session="s4")))

    lane.when = lambda command: "s2" in command
    own_valkey.command("FLUSHALL")
    mirror.wake()
    keys = [f"chat:{{auth}}:revoked:session:{name}" for name in names]
    await eventually(lambda: own_valkey.command("EXISTS", *keys) == b":5")

    await end(tasks)
