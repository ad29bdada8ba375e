"""One connection's life: frames and the store's answers in, effects out.

The rules of protocol.md, sections 2, 3 and 5, without a socket, a store or a clock. The shell
feeds ``receive_frame``, ``receive_outcome`` and ``handle_timer``, then carries out ``effects()``
in order. ``now`` is always the wall clock in seconds.

Commands take effect in the order sent and are answered in that order. Waiting for each answer
before the next command would cost a round trip each, so runs of the same kind (sends, joins,
pages of history) are under way together; another kind waits until they are done.

    open ──exp──▶ expired ──refresh──▶ open
      │              │ 0.5 s
      └──────────────┴──▶ closed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from msgspec import UNSET

from chatserver.core import errors, frames
from chatserver.core.claims import Identity
from chatserver.core.effects import (
    Abandon,
    Admit,
    Close,
    Effect,
    EndSession,
    Failed,
    Identify,
    Join,
    Leave,
    Outcome,
    Page,
    Publish,
    Published,
    Read,
    Refused,
    Resume,
    Transmit,
    Verified,
    Verify,
    Withhold,
)
from chatserver.core.errors import Disconnect, ReplyCode
from chatserver.core.flow import Budget, Limits, Patience, Verdict
from chatserver.core.frames import Command, CommandId
from chatserver.core.room import Reading, recover, rights

PROTOCOL_VERSION = 1
EXPIRED_GRACE = 0.5
"""Seconds after ``exp`` in which a refresh still saves the connection; the wire allows 1."""
CONGESTED = 128
"""Commands under way or waiting at which the shell should stop reading."""
PAGE_BYTES = 262_144
"""A page of history ends here; protocol.md section 2."""


class State(Enum):
    OPEN = auto()
    EXPIRED = auto()
    CLOSED = auto()


class Destination(NamedTuple):
    """One room of a send: what to publish there, or why not (as the fields of an error)."""

    room: str
    refused: dict[str, object] | None


@dataclass(slots=True, eq=False)
class Exchange:
    """A command on its way to its one reply."""

    command: Command | None
    reply: bytes | None = None
    """Ready before its turn: the command needs no more work."""
    destinations: list[Destination] = field(default_factory=list)
    outcomes: list[Outcome | None] = field(default_factory=list)
    missing: int = 0


_ALONGSIDE = (frames.Send, frames.Join, frames.History)
_WHEN_EXPIRED = (frames.Refresh, frames.Logout, frames.Ping)


class ChatProtocol:
    """One authenticated connection. The shell owns its bytes, this owns its rules."""

    __slots__ = (
        "_commands",
        "_effects",
        "_expiring_told",
        "_limits",
        "_next_ref",
        "_patience",
        "_refs",
        "_retiring",
        "_rooms",
        "_sends",
        "_started",
        "_state",
        "_waiting",
        "connection",
        "identity",
    )

    def __init__(self, connection: str, identity: Identity, limits: Limits, now: float) -> None:
        self.connection = connection
        self.identity = identity
        self._limits = limits
        self._state = State.OPEN
        # Joined rooms; False while the first join is under way.
        self._rooms: dict[str, bool] = {}
        self._sends = Budget(limits.send_rate, limits.send_burst, now)
        self._commands = Budget(limits.command_rate, limits.command_burst, now)
        self._patience: Patience | None = None
        # Lists, for they are short, and an empty deque would cost every idle socket 700 bytes.
        self._started: list[Exchange] = []
        self._waiting: list[Exchange] = []
        self._refs: dict[int, tuple[Exchange, int]] = {}
        self._next_ref = 0
        self._expiring_told = False
        self._retiring: Disconnect | None = None
        self._effects: list[Effect] = [Transmit(self._welcome(now))]

    # Output.

    def effects(self) -> list[Effect]:
        """What to do now, in this order. Each is handed out once."""
        effects, self._effects = self._effects, []
        return effects

    @property
    def closed(self) -> bool:
        return self._state is State.CLOSED

    @property
    def congested(self) -> bool:
        """So many commands are unanswered that no more should be read."""
        return len(self._refs) + len(self._waiting) >= CONGESTED

    def wake_at(self) -> float:
        """When ``handle_timer`` is wanted next."""
        if self._state is State.EXPIRED:
            return self.identity.expires_at + EXPIRED_GRACE
        if self._expiring_told:
            return float(self.identity.expires_at)
        return self._expiring_at()

    # Input.

    def receive_frame(self, data: bytes, now: float) -> None:
        """One text frame's payload."""
        if self.closed or self._retiring is not None:
            return
        try:
            exchange = Exchange(frames.parse_command(data))
        except frames.InvalidCommand as invalid:
            self._effects.append(Refused(None, invalid.code))
            exchange = Exchange(None, frames.error(invalid.code, id=invalid.id, path=invalid.path))
        except frames.NotText:
            self.disconnect(errors.NOT_TEXT)
            return
        except frames.NotAFrame:
            self.disconnect(errors.BAD_FRAME)
            return
        self._charge(exchange, now)
        if self.closed:
            return
        self._waiting.append(exchange)
        self._advance(now)

    def receive_outcome(self, ref: int, outcome: Outcome, now: float) -> None:
        """The answer to the effect with this ``ref``. Late answers are ignored."""
        found = self._refs.pop(ref, None)
        if found is None or self._state is State.CLOSED:
            return
        exchange, index = found
        exchange.outcomes[index] = outcome
        exchange.missing -= 1
        self._advance(now)

    def handle_timer(self, now: float) -> None:
        """Time has passed: tell that the token expires, withhold, close."""
        if self._state is State.CLOSED:
            return
        self._check_expiry(now)
        if self._state is State.EXPIRED:
            if now >= self.identity.expires_at + EXPIRED_GRACE:
                self.disconnect(errors.TOKEN_EXPIRED)
        elif not self._expiring_told and now >= self._expiring_at():
            self._expiring_told = True
            self._send(frames.expiring(self.identity.expires_at * 1000))

    def tell_rights_changed(self) -> None:
        """The session's next token says something else: the client should get it now."""
        if self._state is not State.CLOSED:
            self._send(frames.expiring(self.identity.expires_at * 1000, now=True))

    def retire(self, why: Disconnect) -> None:
        """Take nothing new, answer what is under way, then disconnect."""
        self._retiring = why
        if not self._started and not self._waiting:
            self.disconnect(why)

    def disconnect(self, why: Disconnect) -> None:
        """End it, for a reason of the protocol's or of the shell's. Idempotent."""
        if self._state is State.CLOSED:
            return
        self._state = State.CLOSED
        self._refs.clear()
        self._started.clear()
        self._waiting.clear()
        self._effects.append(Close(why))

    # The order of commands.

    def _advance(self, now: float) -> None:
        """Answer what is done at the head of the line, start what may start behind it."""
        progress = True
        while progress and self._state is not State.CLOSED:
            progress = False
            while self._started and self._started[0].missing == 0:
                self._finish(self._started.pop(0), now)
                progress = True
            while self._waiting and self._may_start(self._waiting[0]):
                exchange = self._waiting.pop(0)
                self._started.append(exchange)
                self._start(exchange, now)
                progress = True
        if self._retiring is not None:
            self.retire(self._retiring)

    def _may_start(self, exchange: Exchange) -> bool:
        if not self._started or exchange.reply is not None:
            return True
        command = exchange.command
        if not isinstance(command, _ALONGSIDE):
            return False
        for other in self._started:
            if other.reply is not None:
                continue
            if type(other.command) is not type(command):
                return False
            # Two joins of one room are two positions: the later must win, so it comes later.
            if isinstance(command, frames.Join) and other.command.room == command.room:
                return False
        return True

    def _charge(self, exchange: Exchange, now: float) -> None:
        """Take the command from its budget, or prepare its refusal."""
        command = exchange.command
        if isinstance(command, frames.Send):
            for room in (command.room,) if command.rooms is UNSET else command.rooms:
                assert room is not UNSET
                exchange.destinations.append(Destination(room, _spend(self._sends, now)))
            # The rooms are paid for one by one, so the last is refused if any is.
            refused = exchange.destinations[-1].refused
            if refused and command.rooms is UNSET:
                self._effects.append(Refused(command, ReplyCode.RATE_LIMITED))
                exchange.reply = _error_frame(refused, command.reply_to)
        elif (refused := _spend(self._commands, now)) and command is not None:
            self._effects.append(Refused(command, ReplyCode.RATE_LIMITED))
            exchange.reply = _error_frame(refused, command.reply_to)
        if refused:
            # Once for the command, however many rooms: a thousand of any kind are borne.
            self._patience = self._patience or Patience()
            if self._patience.refused(now) is Verdict.DISCONNECT:
                self.disconnect(errors.RATE_LIMITED)

    # Starting a command.

    def _start(self, exchange: Exchange, now: float) -> None:
        if exchange.reply is not None:
            return
        command = exchange.command
        self._check_expiry(now)
        if self._state is State.EXPIRED and not isinstance(command, _WHEN_EXPIRED):
            self._refuse(exchange, ReplyCode.TOKEN_EXPIRED)
            return
        match command:
            case frames.Send():
                self._start_send(exchange, command)
            case frames.Join():
                self._start_join(exchange, command)
            case frames.History():
                self._start_history(exchange, command)
            case frames.Refresh():
                self._effects.append(Verify(self._await(exchange), command.token))
            case frames.Logout():
                self._effects.append(EndSession(self._await(exchange), self.identity.session))
            case frames.Leave():
                self._leave(command.room)
            case frames.Ping():
                pass
            case _:
                raise AssertionError(command)

    def _start_send(self, exchange: Exchange, command: frames.Send) -> None:
        key = None if command.key is UNSET else command.key
        user = self.identity.user
        for index, (room, refused) in enumerate(exchange.destinations):
            if refused is None and "w" not in rights(self.identity, room):
                refused = frames.refusal(ReplyCode.FORBIDDEN)
                exchange.destinations[index] = Destination(room, refused)
            ref = self._await(exchange)
            if refused is not None:
                # Holds its place among the results; nothing is asked of the store.
                del self._refs[ref]
                exchange.missing -= 1
                continue
            head, tail = frames.message_parts(room, user, command.body, key)
            self._effects.append(Publish(ref, room, head, tail, user, key, command.echo))

    def _start_join(self, exchange: Exchange, command: frames.Join) -> None:
        if "r" not in rights(self.identity, command.room):
            self._refuse(exchange, ReplyCode.FORBIDDEN)
        elif command.room not in self._rooms and len(self._rooms) >= self._limits.rooms:
            self._refuse(exchange, ReplyCode.ROOM_LIMIT)
        else:
            self._rooms.setdefault(command.room, False)
            since = None if command.since is UNSET else command.since
            # What a failed recovery falls back on is read along, for it costs no round trip.
            last = command.last if command.last is not UNSET else 0 if since is None else 50
            self._effects.append(Join(self._await(exchange), command.room, since, last))

    def _start_history(self, exchange: Exchange, command: frames.History) -> None:
        if "r" not in rights(self.identity, command.room):
            self._refuse(exchange, ReplyCode.FORBIDDEN)
            return
        before = None if command.before is UNSET else command.before
        after = None if command.after is UNSET else command.after
        self._effects.append(
            Read(self._await(exchange), command.room, before, after, command.limit)
        )

    def _await(self, exchange: Exchange) -> int:
        """One more outcome is expected; returns the reference it will come with."""
        self._next_ref += 1
        self._refs[self._next_ref] = (exchange, len(exchange.outcomes))
        exchange.outcomes.append(None)
        exchange.missing += 1
        return self._next_ref

    # Finishing a command: its turn to be answered has come.

    def _finish(self, exchange: Exchange, now: float) -> None:
        if exchange.reply is not None:
            if exchange.reply:
                self._send(exchange.reply)
            return
        command = exchange.command
        self._check_expiry(now)
        match command:
            case frames.Send():
                self._finish_send(exchange, command)
            case frames.Join():
                self._finish_join(exchange.outcomes[0], command)
            case frames.History():
                self._finish_history(exchange.outcomes[0], command)
            case frames.Refresh():
                self._finish_refresh(exchange.outcomes[0], command, now)
            case frames.Logout():
                self._finish_logout(exchange.outcomes[0], command)
            case frames.Leave():
                self._ack(command.reply_to, room=command.room)
            case frames.Ping():
                self._ack(command.reply_to, ts=int(now * 1000))
            case _:
                raise AssertionError(command)

    def _finish_send(self, exchange: Exchange, command: frames.Send) -> None:
        results = [
            _result(destination, outcome)
            for destination, outcome in zip(exchange.destinations, exchange.outcomes, strict=True)
        ]
        if command.rooms is not UNSET:
            self._effects += [
                Refused(command, result["error"]["code"])  # type: ignore[index]
                for result in results
                if "error" in result
            ]
            self._ack(command.reply_to, results=results)
        elif refused := results[0].get("error"):
            assert isinstance(refused, dict)
            self._effects.append(Refused(command, refused["code"]))
            self._send(_error_frame(refused, command.reply_to))
        else:
            self._ack(command.reply_to, **results[0])

    def _finish_join(self, outcome: Outcome | None, command: frames.Join) -> None:
        room = command.room
        granted = rights(self.identity, room)
        if isinstance(outcome, Failed):
            self._abandon(command, outcome.code)
        elif self._state is State.EXPIRED:
            self._abandon(command, ReplyCode.TOKEN_EXPIRED)
        elif "r" not in granted:
            self._abandon(command, ReplyCode.FORBIDDEN)
        else:
            assert isinstance(outcome, Reading)
            recovery = recover(
                outcome,
                since=None if command.since is UNSET else command.since,
                last=None if command.last is UNSET else command.last,
                replay=self._limits.replay,
            )
            told: dict[str, object] = {"replay": outcome.top - recovery.start}
            if recovery.recovered is not None:
                told["recovered"] = recovery.recovered
            if recovery.gap is not None:
                told["gap"] = {"from": recovery.gap[0], "to": recovery.gap[1]}
            self._ack(
                command.reply_to,
                room=room,
                epoch=outcome.epoch,
                offset=outcome.top,
                rights=granted,
                **told,
            )
            self._rooms[room] = True
            self._effects.append(Admit(room, recovery.start, outcome))

    def _abandon(self, command: frames.Join, code: ReplyCode) -> None:
        room = command.room
        self._effects.append(Abandon(room))
        # A room that was joined before stays joined where it was.
        if code is ReplyCode.FORBIDDEN or not self._rooms.get(room):
            self._leave(room)
        self._fail(command, code)

    def _finish_history(self, outcome: Outcome | None, command: frames.History) -> None:
        if isinstance(outcome, Failed):
            self._fail(command, outcome.code)
            return
        if self._state is State.EXPIRED:
            self._fail(command, ReplyCode.TOKEN_EXPIRED)
            return
        assert isinstance(outcome, Page)
        reading = outcome.reading
        self._ack(
            command.reply_to,
            room=command.room,
            epoch=reading.epoch,
            offset=reading.top,
            events=[frames.Fragment(event.payload) for event in reading.events],
            more=outcome.more,
        )

    def _finish_refresh(self, outcome: Outcome | None, command: frames.Refresh, now: float) -> None:
        if isinstance(outcome, Failed):
            self._fail(command, outcome.code)
            return
        assert isinstance(outcome, Verified)
        old, new = self.identity, outcome.identity
        if (new.user, new.session) != (old.user, old.session) or new.issued_at < old.issued_at:
            self._fail(command, ReplyCode.IDENTITY_MISMATCH)
            return
        if outcome.revoked:
            self._fail(command, ReplyCode.TOKEN_REVOKED)
            self.disconnect(errors.SESSION_REVOKED)
            return
        if now >= new.expires_at:
            self._fail(command, ReplyCode.TOKEN_EXPIRED)
            return
        self._adopt(new, command.reply_to)

    def _finish_logout(self, outcome: Outcome | None, command: frames.Logout) -> None:
        if isinstance(outcome, Failed):
            self._fail(command, outcome.code)
            return
        # Its sockets on other workers hear of it as of any revocation; this one need not wait.
        self._ack(command.reply_to)
        self.disconnect(errors.SESSION_REVOKED)

    def _adopt(self, identity: Identity, reply_to: CommandId | None) -> None:
        # Told once for each token: a client that answered with the same one would never be done.
        self._expiring_told &= identity.token_id == self.identity.token_id
        self.identity = identity
        self._effects.append(Identify(identity))
        lost = sorted(room for room in self._rooms if "r" not in rights(identity, room))
        for room in lost:
            self._leave(room)
        self._ack(
            reply_to,
            expires_at=identity.expires_at * 1000,
            roles=list(identity.roles),
            left=lost,
        )
        if self._state is State.EXPIRED:
            self._state = State.OPEN
            self._effects.append(Resume())

    # Small steps.

    def _leave(self, room: str) -> None:
        self._rooms.pop(room, None)
        self._effects.append(Leave(room))

    def _refuse(self, exchange: Exchange, code: ReplyCode) -> None:
        assert exchange.command is not None
        self._effects.append(Refused(exchange.command, code))
        exchange.reply = frames.error(code, id=exchange.command.reply_to)

    def _fail(self, command: Command, code: ReplyCode) -> None:
        self._effects.append(Refused(command, code))
        self._send(frames.error(code, id=command.reply_to))

    def _ack(self, reply_to: CommandId | None, **told: object) -> None:
        if reply_to is not None:
            self._send(frames.ack(reply_to, **told))

    def _send(self, payload: bytes) -> None:
        self._effects.append(Transmit(payload))

    def _check_expiry(self, now: float) -> None:
        if self._state is State.OPEN and now >= self.identity.expires_at:
            self._state = State.EXPIRED
            self._effects.append(Withhold())

    def _expiring_at(self) -> float:
        lifetime = self.identity.expires_at - self.identity.issued_at
        return self.identity.expires_at - min(60.0, 0.2 * lifetime)

    def _welcome(self, now: float) -> bytes:
        identity, limits = self.identity, self._limits
        return frames.dumps(
            {
                "type": "welcome",
                "protocol": PROTOCOL_VERSION,
                "connection": self.connection,
                "session": identity.session,
                "user": identity.user,
                "roles": list(identity.roles),
                "ts": int(now * 1000),
                "expires_at": identity.expires_at * 1000,
                "ping_interval": int(limits.ping_interval * 1000),
                "limits": {
                    "frame_bytes": limits.frame_bytes,
                    "rooms": limits.rooms,
                    "send_rate": limits.send_rate,
                    "send_burst": limits.send_burst,
                    "command_rate": limits.command_rate,
                    "command_burst": limits.command_burst,
                    "key_window": int(limits.key_window * 1000),
                    "history": limits.history,
                    "replay": limits.replay,
                },
            }
        )


def _spend(budget: Budget, now: float) -> dict[str, object] | None:
    """Take one from the budget, or return the refusal's fields."""
    wait = budget.spend(now)
    if not wait:
        return None
    return frames.refusal(ReplyCode.RATE_LIMITED, retry_after=int(wait * 1000) + 1)


def _result(destination: Destination, outcome: Outcome | None) -> dict[str, object]:
    """One room's part of a send's reply."""
    room, refused = destination
    if refused is None and isinstance(outcome, Failed):
        refused = frames.refusal(outcome.code)
    if refused is not None:
        return {"room": room, "error": refused}
    assert isinstance(outcome, Published)
    result: dict[str, object] = {
        "room": room,
        "epoch": outcome.epoch,
        "offset": outcome.offset,
        "ts": outcome.ts,
    }
    if outcome.duplicate:
        result["duplicate"] = True
    return result


def _error_frame(refused: dict[str, object], reply_to: CommandId | None) -> bytes:
    head: dict[str, object] = {"type": "error"}
    if reply_to is not None:
        head["id"] = reply_to
    return frames.dumps(head | refused)
