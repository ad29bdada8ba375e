"""The run: processes are started, told what to do and when, and what they say is put together."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess

from .agenda import SECOND
from .credentials import Credentials
from .crowd import Address
from .options import Options
from .process import Done, Failed, Leave, Load, Order, Place, Ramp, Said, Settle, Stop, Tops, main
from .results import Results
from .tally import Sample

START_SECONDS = 60.0
"""Until every process is up."""
MARGIN_SECONDS = 30.0
"""Beyond the patience it was given, until a process counts as lost."""
END_SECONDS = 5.0
AHEAD = SECOND // 10
"""How long before the moment the processes are told to begin."""


class RunFailed(Exception):
    """The load test itself is broken; the message says how."""


class Coordinator:
    """One run. Watch ``phase`` and ``results`` meanwhile."""

    def __init__(self, options: Options, credentials: Credentials, address: Address) -> None:
        self._options = options
        self._credentials = credentials
        self._address = address
        self._processes: list[BaseProcess] = []
        self._pipes: list[Pipe] = []
        self._done: set[tuple[int, type[Order] | None]] = set()
        self._tops: Tops = {}
        self._failure = ""
        self._leaving = False
        self._news = asyncio.Event()
        self._over = False
        self.phase = "starting"
        self.results = Results(options, 0)

    def end_early(self) -> None:
        """Go on with what comes after the load: nothing new is sent, and what is under way ends."""
        self._over = self.results.ended_early = True
        self._news.set()

    async def run(self) -> Results:
        """Raises RunFailed."""
        patience = self._options.grace
        try:
            self._start()
            await self._all_done(None, START_SECONDS)
            if await self._ramp(patience):
                await self._load()
            self.phase = "settling"
            self._tell(Stop(patience))
            await self._all_done(Stop, patience + MARGIN_SECONDS)
            self._tell(Settle(self._tops, patience))
            await self._all_done(Settle, patience + MARGIN_SECONDS)
            self._leaving = True
            self._tell(Leave())
        finally:
            await self._end()
        self.results.finish()
        return self.results

    # The run.

    def _start(self) -> None:
        # A fork would take over this process's loop and its signals.
        context = multiprocessing.get_context("spawn")
        loop = asyncio.get_running_loop()
        # Ctrl-C is ours: who is started now goes on ignoring it.
        ours_again = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in range(self._options.processes):
            ours, theirs = context.Pipe()
            place = Place(self._options, number, self._credentials, self._address)
            process = context.Process(target=main, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()  # Or its end would not be noticed.
            self._processes.append(process)
            self._pipes.append(ours)
            loop.add_reader(ours.fileno(), self._hear, number, ours)
        signal.signal(signal.SIGINT, ours_again)

    async def _ramp(self, patience: float) -> bool:
        """Whether anybody got in."""
        self.phase = "connecting"
        began = time.monotonic_ns() + AHEAD
        self.results.began = began
        self._tell(Ramp(began, patience))
        ramp = self._options.sockets / self._options.ramp
        await self._wait(
            lambda: self._over or self._all(Ramp), ramp + patience + MARGIN_SECONDS, "its ramp"
        )
        return self.results.counts["connects"] > 0 and not self._over

    async def _load(self) -> None:
        self.phase = "loading"
        began = time.monotonic_ns() + AHEAD
        self._tell(Load(began))
        seconds = AHEAD / SECOND + self._options.duration
        await self._wait(lambda: self._over, seconds)

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if self._leaving:
                await asyncio.to_thread(process.join, END_SECONDS)
            process.kill()
            process.join()
            loop.remove_reader(pipe.fileno())
            pipe.close()

    # What is said.

    def _tell(self, order: Order) -> None:
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # Its end is heard, and fails the run.
                pipe.send(order)

    def _hear(self, number: int, pipe: Pipe) -> None:
        try:
            said: Said = pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            if not self._leaving:
                self._fail(f"process {number + 1} of the load test died")
            return
        match said:
            case Sample():
                self.results.add(said)
            case Done(order, tops, send_rate):
                self._done.add((number, order))
                self.results.send_rate = max(self.results.send_rate, send_rate)
                for place, top in (tops or {}).items():
                    self._tops[place] = max(top, self._tops.get(place, 0))
                self._news.set()
            case Failed(what):
                self._fail(what)

    def _fail(self, what: str) -> None:
        self._failure = self._failure or what
        self._news.set()

    def _all(self, order: type[Order] | None) -> bool:
        return all((n, order) in self._done for n in range(self._options.processes))

    async def _all_done(self, order: type[Order] | None, seconds: float) -> None:
        name = order.__name__.lower() if order else "start"
        await self._wait(lambda: self._all(order), seconds, f"its {name}")

    async def _wait(self, condition: Callable[[], bool], seconds: float, what: str = "") -> None:
        """Until it is true; where it has to become true in time, ``what`` names it."""
        deadline = time.monotonic() + seconds
        while not self._failure and not condition():
            self._news.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._news.wait()
            except TimeoutError:
                if what:
                    self._fail(f"a process of the load test did not end {what} in {seconds:.0f} s")
                break
        if self._failure:
            raise RunFailed(self._failure)
