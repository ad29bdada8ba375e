"""One process of the load test: its clients, its loop, and what it tells the coordinator.

Coordinator and process talk over a pipe: orders one way, samples and answers the other. When the
pipe ends, so does the process.
"""

from __future__ import annotations

import asyncio
import gc
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from multiprocessing.connection import Connection as Pipe
from typing import Any, NamedTuple

import uvloop

from .agenda import SECOND, Agenda
from .credentials import Credentials
from .crowd import Address, Crowd
from .options import Options
from .tally import Measure, Sample, Tally

BEAT = SECOND // 100
"""How often a process looks how late it is."""
LOOK_SECONDS = 0.1
LEAVE_SECONDS = 0.2
"""For close frames to go out; then the sockets are reset."""

Tops = dict[tuple[str, str], int]
"""The highest offset acked, by room and epoch."""


class Ramp(NamedTuple):
    """Connect, from this moment of the monotonic clock (ns). Done when all that can are in."""

    at: int
    patience: float


class Load(NamedTuple):
    """Begin what the scenario does, at this moment."""

    at: int


class Stop(NamedTuple):
    """Begin nothing more. Done when what is under way has ended: sends, rejoins, revocations."""

    patience: float


class Settle(NamedTuple):
    """Done when what was acked anywhere has come to all who should have it."""

    tops: Tops
    patience: float


class Leave(NamedTuple):
    """Close everything, and end."""


Order = Ramp | Load | Stop | Settle | Leave


class Done(NamedTuple):
    """An order has been carried out, or its patience is over; without one: the process is up."""

    order: type[Order] | None
    tops: Tops | None = None
    send_rate: float = 0.0
    """What the server lets a connection send per second, once that is known."""


class Failed(NamedTuple):
    """Something in here is wrong, and with it perhaps every figure."""

    what: str


Said = Sample | Done | Failed


class Place(NamedTuple):
    """What a process has to know."""

    options: Options
    process: int
    credentials: Credentials
    address: Address


def main(pipe: Pipe, place: Place) -> None:
    """The whole process."""
    # A full collection over tens of thousands of clients takes longer than what is measured.
    gc.set_threshold(50_000, 50, 100)
    with suppress(BrokenPipeError):  # The coordinator may be gone.
        uvloop.run(_serve(pipe, place))


async def _serve(pipe: Pipe, place: Place) -> None:
    orders = _orders(pipe)
    agenda = Agenda()
    process = _Process(pipe, place, agenda)
    asyncio.get_running_loop().set_exception_handler(process.fail)
    process.say(Done(None))
    try:
        while (order := await orders.get()) is not None:
            await process.obey(order)
            if isinstance(order, Leave):
                break
    finally:
        process.close()
        agenda.close()


def _orders(pipe: Pipe) -> asyncio.Queue[Order | None]:
    """What the pipe brings; None is its end."""
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[Order | None] = asyncio.Queue()

    def hear() -> None:
        order: Order | None = None
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
        orders.put_nowait(order)

    loop.add_reader(pipe.fileno(), hear)
    return orders


class _Process:
    def __init__(self, pipe: Pipe, place: Place, agenda: Agenda) -> None:
        self._pipe = pipe
        self._agenda = agenda
        self._tally = Tally(place.process)
        self._crowd = Crowd(
            place.options,
            place.process,
            self._tally,
            agenda,
            place.credentials,
            place.address,
        )
        self._start = place.options.behaviour.start
        self._tasks: set[asyncio.Task[None]] = set()

    def say(self, said: Said) -> None:
        self._pipe.send(said)

    def fail(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's handler of what nobody caught."""
        error = context.get("exception")
        trace = "".join(traceback.format_exception(error)) if error else ""
        self.say(Failed(f"{context['message']}\n{trace}"))

    async def obey(self, order: Order) -> None:
        """Returns when the next order may come: before a ramp is over, for it can be cut short."""
        crowd = self._crowd
        match order:
            case Ramp(at, patience):
                self._agenda.every(at, BEAT, self._beat)
                crowd.ramp(at)
                self._keep(self._sample_each_second(at))
                self._keep(self._await_entries(at, patience))
            case Load(at):
                self._begin("load")
                # Whoever is there by now stays: no collection needs to look at them.
                gc.freeze()
                self._start(crowd, at)
            case Stop(patience):
                self._agenda.make_up()
                self._begin("settle")
                crowd.stop()
                await _until(lambda: not crowd.busy(), patience)
                self.say(Done(Stop, crowd.tops, crowd.send_rate))
            case Settle(tops, patience):
                await _until(lambda: not crowd.overdue(tops), patience)
                crowd.count_what_is_missing(tops)
                self.say(self._tally.sample())
                self.say(Done(Settle))
            case Leave():
                crowd.leave()
                await asyncio.sleep(LEAVE_SECONDS)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _keep(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin(self, phase: str) -> None:
        self.say(self._tally.sample())
        self._tally.phase = phase

    def _beat(self, due: int) -> None:
        self._tally.record(Measure.LAG, due, time.monotonic_ns())

    async def _sample_each_second(self, at: int) -> None:
        while True:
            passed = (time.monotonic_ns() - at) % SECOND
            await asyncio.sleep((SECOND - passed) / SECOND)
            self.say(self._tally.sample())

    async def _await_entries(self, at: int, patience: float) -> None:
        """Until all are in or will never be. The patience begins when the last was to connect."""
        crowd = self._crowd
        ramp = (at - time.monotonic_ns()) / SECOND + crowd.options.sockets / crowd.options.ramp
        with suppress(TimeoutError):
            async with asyncio.timeout(ramp + patience):
                await crowd.wait_settled()
        self.say(self._tally.sample())
        self.say(Done(Ramp, None, crowd.send_rate))


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for it, but no longer than that."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(LOOK_SECONDS)
