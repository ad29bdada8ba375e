"""A worker whose clock is not the store's: by libfaketime, with the monotonic clock left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatserver.core.session import Kind
from chatserver.store.link import Store
from chatserver.store.revocations import revoke
from tests.support.client import Client, http, refused
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, Worker, eventually

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
pytestmark = pytest.mark.skipif(
    not LIBRARIES, reason="libfaketime is not installed (on Debian: apt install faketime)"
)
DIFFERS = "clock differs from the store's; refusing tokens"


class Clock:
    """What a worker takes for the time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.shift(0)

    def shift(self, seconds: int) -> None:
        # At once: the worker reads it whenever it wants to know the time.
        written = self._path.with_suffix(".new")
        written.write_text(f"{seconds:+d}\n")
        written.replace(self._path)

    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


@pytest.fixture
def astray(valkey: Valkey, issuer: Issuer, tmp_path: Path, clock: Clock) -> Iterator[Worker]:
    worker = Worker(tmp_path / "log", valkey.url, issuer)
    worker.under(**clock.environment())
    worker.expected_errors.add(DIFFERS)
    yield worker
    worker.stop()


def bearer(issuer: Issuer, user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {issuer.token(user)}"}


async def accepts(worker: Worker, issuer: Issuer, user: str) -> None:
    """Wait until it would let somebody in."""
    async with asyncio.timeout(PATIENCE):
        while (await http(worker.url, headers=bearer(issuer, user))).status != 426:
            pass


@pytest.mark.parametrize("seconds", [1200, -1200, 7])
async def test_a_worker_whose_clock_goes_astray_accepts_nothing_until_it_is_right_again(
    astray: Worker, clock: Clock, valkey: Valkey, issuer: Issuer, user: str, seconds: int
) -> None:
    """What was revoked before and meanwhile is revoked afterwards, too."""
    before, meanwhile = unique("s"), unique("s")
    astray.start()
    async with Store(valkey.url) as store:
        await revoke(store.call, Kind.SESSION, before)
        clock.shift(seconds)
        await eventually(lambda: astray.log_lines(DIFFERS) == 1)
        good = await refused(astray.url, issuer.token(user))
        await revoke(store.call, Kind.SESSION, meanwhile)
        clock.shift(0)

    await accepts(astray, issuer, user)
    answers = [
        await refused(astray.url, issuer.token(user, session=session))
        for session in (before, meanwhile)
    ]
    async with await Client.connect(astray.url, issuer.token(user)) as client:
        await client.ping()

    assert (good.status, good.code) == (503, "unavailable")
    assert [(answer.status, answer.code) for answer in answers] == [(401, "token_revoked")] * 2


async def test_a_worker_that_starts_with_a_wrong_clock_says_so_and_gets_ready_when_it_is_right(
    astray: Worker, clock: Clock, issuer: Issuer, user: str
) -> None:
    clock.shift(1200)
    astray.start()
    answer = await refused(astray.url, issuer.token(user))
    clock.shift(0)
    await accepts(astray, issuer, user)

    assert (answer.status, answer.code) == (503, "unavailable")
    assert astray.log_lines(DIFFERS) == 1
