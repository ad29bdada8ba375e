"""The proxy does what it is told, and nothing when it is told nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.proxy import Proxy, Weather
from tests.support.worker import PATIENCE, eventually

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
DATA = bytes(range(256)) * 1000


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Proxy, Streams, Streams]]:
    """A proxy, and both ends of a connection through it: the client's first."""
    arrived: asyncio.Queue[Streams] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await arrived.put((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy = Proxy(server.sockets[0].getsockname(), seed=1)
    await proxy.start()
    client = await asyncio.open_connection("127.0.0.1", proxy.port)
    peer = await arrived.get()
    await eventually(lambda: proxy.links)
    try:
        async with asyncio.timeout(PATIENCE):
            yield proxy, client, peer
    finally:
        for _, writer in (client, peer):
            writer.transport.abort()
        await proxy.close()
        server.close()


async def test_it_passes_everything_both_ways() -> None:
    async with connected() as (proxy, client, peer):
        client[1].write(DATA)
        peer[1].write(DATA[::-1])

        assert await peer[0].readexactly(len(DATA)) == DATA
        assert await client[0].readexactly(len(DATA)) == DATA[::-1]
        assert [link.port for link in proxy.links] == [client[1].get_extra_info("sockname")[1]]


async def test_it_delays_and_keeps_the_order() -> None:
    async with connected() as (proxy, client, peer):
        proxy.up.delay, proxy.up.jitter = 0.1, 0.05
        began = time.monotonic()
        client[1].write(DATA)

        assert await peer[0].readexactly(len(DATA)) == DATA
        # A delay is no rate: sixty chunks take no longer than one.
        assert 0.1 <= time.monotonic() - began < 60 * 0.1


async def test_it_holds_and_loses_nothing() -> None:
    async with connected() as (proxy, client, peer):
        proxy.up.frozen = True
        client[1].write(b"held")
        reading = asyncio.create_task(peer[0].readexactly(4))
        peer[1].write(b"the other way")
        assert await client[0].readexactly(13) == b"the other way"

        assert not reading.done()
        proxy.calm()
        assert await reading == b"held"


async def test_it_has_a_rate() -> None:
    async with connected() as (proxy, client, peer):
        proxy.up.rate = 40_000
        began = time.monotonic()
        client[1].write(DATA[:10_000])
        await peer[0].readexactly(10_000)

        assert time.monotonic() - began > 0.1


async def test_it_flips_one_bit_of_a_chunk() -> None:
    async with connected() as (proxy, client, peer):
        [link] = proxy.links
        link.up = Weather(flip=1.0)
        client[1].write(DATA[:1000])
        got = await peer[0].readexactly(1000)

        different = [one ^ other for one, other in zip(got, DATA[:1000], strict=True)]
        assert sum(bits.bit_count() for bits in different) == proxy.flipped >= 1


async def test_it_cuts_a_chunk_and_ends() -> None:
    async with connected() as (proxy, client, peer):
        proxy.up.truncate = True
        client[1].write(DATA[:1000])

        assert await peer[0].read(-1) == DATA[:500]
        assert await client[0].read(-1) == b""


async def test_it_ends_one_way_only() -> None:
    async with connected() as (proxy, client, peer):
        [link] = proxy.links
        link.half_close()
        client[1].write(b"nobody hears that")
        assert await peer[0].read(-1) == b""
        peer[1].write(b"but this")

        assert await client[0].readexactly(8) == b"but this"


async def test_it_passes_an_end_on() -> None:
    async with connected() as (_, client, peer):
        client[1].write(b"bye")
        client[1].write_eof()
        assert await peer[0].read(-1) == b"bye"
        peer[1].close()

        assert await client[0].read(-1) == b""


async def test_it_resets() -> None:
    async with connected() as (proxy, client, peer):
        proxy.reset()

        for reader, _ in (client, peer):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        await eventually(lambda: not proxy.links)


async def test_it_hangs_up_when_nobody_is_there(tmp_path: Path) -> None:
    proxy = Proxy(Path("/nonexistent"))
    path = Path(f"{tmp_path}/p")
    await proxy.start(path)
    reader, writer = await asyncio.open_unix_connection(path)

    assert await reader.read(1) == b""
    writer.close()
    await proxy.close()
