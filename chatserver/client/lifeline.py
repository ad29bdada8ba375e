"""One connection after another, for as long as that makes sense, and what is said about it.

A single task supervises: it connects, reads every frame, and waits before it connects again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from .backoff import Backoff
from .connection import Connection
from .errors import ChatError, CommandError, DisconnectedError, RefusedError, TokenRefusedError
from .events import Frame, FrameError, Welcome, parse
from .link import Link, check_url
from .states import Closed, Connecting, Open, State, Waiting
from .tokens import NoTokenError, Tokens, TokenSource

log = logging.getLogger("chatserver.client")

# Frames read before the tasks that take events from rooms get their turn: one read from the
# socket may hold thousands, which would fill a room's queue though its reader is quick.
TURN = 128
# Connecting with its welcome, or a new token.
CONNECT_SECONDS = 10.0


class Lifeline(ABC):
    """What a client holds on to: it has at most one connection at a time, in ``_connection``.

    The client says what that is good for: `_begin` is called with each new connection, `_receive`
    with each frame, `_lose` when it is gone, and `_end` once, when there will not be another.
    """

    welcome: Welcome
    """The latest connection's."""

    def __init__(
        self,
        url: str,
        token: str | TokenSource,
        patience: float,
        backoff: Backoff,
        on_state: Callable[[State], None] | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        check_url(url)
        self.state: State = Connecting()
        self._url = url
        self._tls = tls
        self._backoff = backoff
        self._on_state = on_state
        self._loop = asyncio.get_running_loop()
        self._patient_until = self._loop.time() + patience
        self._entered = False
        """Whether anybody was told that there is a connection: before that, patience has an end."""
        self._tokens = Tokens(token, CONNECT_SECONDS)
        self._change: asyncio.Future[None] | None = None
        self._connection: Connection | None = None
        self._supervisor = asyncio.create_task(self._supervise())

    @abstractmethod
    def _begin(self, connection: Connection) -> None: ...

    @abstractmethod
    def _receive(self, connection: Connection, frame: Frame) -> None:
        """Raises FrameError for what is not of the protocol."""

    @abstractmethod
    def _lose(self, connection: Connection) -> None: ...

    @abstractmethod
    def _end(self, why: Exception | None) -> None:
        """``why`` is None when it was closed from here."""

    async def close(self) -> None:
        """Say goodbye, and come back no more."""
        self._finish(None)
        try:
            if self._connection is not None:
                link = self._connection.link
                self._drop()
                await link.close()
        finally:
            # Also when the wait for the server's goodbye was cancelled.
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            await self._tokens.close()

    async def opened(self) -> None:
        """Wait until there is a connection. Raises what `Closed` tells."""
        await self._opened()
        self._entered = True

    async def _supervise(self) -> None:
        try:
            while (wait := await self._live()) is not None:
                await asyncio.sleep(wait)
                self._tell(Connecting())
        except Exception as exc:
            # A mistake in this very module: nobody must wait for ever because of it.
            log.exception("the client failed")
            self._finish(exc)
            self._drop()

    async def _live(self) -> float | None:
        """One connection, to its end. Returns how long to wait before the next; None: it is over,
        which has been told."""
        connection, lived = await self._connect(), 0.0
        if isinstance(connection, Connection):
            why = await self._converse(connection)
            lived = connection.age
        else:
            why = connection
        if isinstance(self.state, Closed):
            return None
        wait = self._backoff.wait_after(why, lived)
        if isinstance(why, NoTokenError):
            why, wait = why.why, None
        if wait is None or not self._is_patient(wait):
            self._finish(why)
            return None
        self._tell(Waiting(time.time() + wait, why))
        return wait

    async def _connect(self) -> Connection | Exception:
        try:
            token = await self._tokens.get(self._loop.time())
            link = await Link.open(self._url, token, self._tls, CONNECT_SECONDS)
        except TokenRefusedError as exc:
            return exc
        except RefusedError as exc:
            if exc.status == 401:
                return self._refused(exc, expired=exc.code == "token_expired")
            return exc
        except (ChatError, NoTokenError, TimeoutError) as exc:
            return exc
        # Whatever the application's function raises may pass, but for the first time: then it is
        # more likely to be a mistake, and somebody waits who can be told.
        except Exception as exc:  # noqa: BLE001
            return exc if self._welcomed else NoTokenError(exc)
        return Connection(link, self._loop)

    async def _converse(self, connection: Connection) -> Exception:
        """Returns why it ended."""
        try:
            self._take_up(connection)
            for count in itertools.count(1):
                frame = parse(await connection.link.receive())
                # What comes while it is being closed from here would begin what nobody ends.
                if self._connection is connection:
                    self._receive(connection, frame)
                del frame  # It would be kept until the next one comes.
                if count % TURN == 0:
                    await asyncio.sleep(0)
        except FrameError as exc:
            self._drop()
            await connection.link.close(1002)
            return DisconnectedError(1002, str(exc))
        except DisconnectedError as exc:
            return self._refused(exc, expired=True) if exc.code == 4401 else exc
        except CommandError as exc:
            return NoTokenError(exc)
        finally:
            self._drop()
            # Usually it has ended; but not when this task was cancelled, or is wrong.
            connection.link.abort(DisconnectedError(1006, "dropped by this client"))
        raise AssertionError

    def _refused(self, why: ChatError, *, expired: bool) -> Exception:
        """The token is not good any more: final when there cannot be another."""
        another = self._tokens.refuse(why, expired=expired)
        return why if another else NoTokenError(why)

    @property
    def _welcomed(self) -> bool:
        return hasattr(self, "welcome")

    def _is_patient(self, wait: float) -> bool:
        return self._entered or self._loop.time() + wait <= self._patient_until

    def _take_up(self, connection: Connection) -> None:
        welcome = connection.link.welcome
        if self._welcomed and welcome.user != self.welcome.user:
            # Positions and keys are one user's own.
            raise CommandError("identity_mismatch", "The new token is another user's.")
        self._connection = connection
        self.welcome = welcome
        self._tokens.accept(connection.left(self.welcome.expires_at), self._loop.time())
        self._begin(connection)
        self._tell(Open(self.welcome.connection))

    def _drop(self) -> None:
        """The connection is gone: nothing of it will come any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._lose(connection)

    def _give_up(self, why: Exception) -> None:
        """End it though there is a connection."""
        self._finish(why)
        if self._connection is not None:
            self._connection.link.abort(DisconnectedError(1006, "given up by this client"))

    def _finish(self, why: Exception | None) -> None:
        if not isinstance(self.state, Closed):
            self._tell(Closed(why))
            self._end(why)

    def _tell(self, state: State) -> None:
        if isinstance(self.state, Closed):
            return
        self.state = state
        if self._change is not None:
            self._change.set_result(None)
            self._change = None
        if self._on_state is not None:
            try:
                self._on_state(state)
            # The application's mistake is not to take its connection with it.
            except Exception:
                log.exception("on_state raised")

    def _over(self) -> Exception:
        assert isinstance(self.state, Closed)
        if self.state.why is None:
            return DisconnectedError(1000, "closed by this client")
        # Raised more than once: what it has gathered on the way belongs to others.
        return self.state.why.with_traceback(None)

    def _check_open(self) -> None:
        if isinstance(self.state, Closed):
            raise self._over()

    async def _opened(self) -> Connection:
        while self._connection is None or not self._connection.open:
            self._check_open()
            if self._change is None:
                self._change = self._loop.create_future()
            await asyncio.shield(self._change)
        return self._connection
