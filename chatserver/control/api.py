"""The control API's routes, and the store as they use it."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Awaitable, Callable
from itertools import groupby
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from chatserver.control.answers import answer, errors, fault, faults
from chatserver.control.door import Door
from chatserver.control.schema import (
    ID,
    ConnectedPage,
    Events,
    Health,
    NewMessage,
    NewRevocation,
    NewSession,
    Offset,
    Place,
    Revoked,
    Rights,
    RoomPage,
    RoomPath,
    Session,
    SessionPath,
    TokenPair,
    Workers,
)
from chatserver.core import frames
from chatserver.core.effects import Publish, Published
from chatserver.core.errors import StoreUnavailable
from chatserver.core.protocol import PAGE_BYTES
from chatserver.core.room import Reading, has_more
from chatserver.core.session import Kind
from chatserver.exposition import OPENMETRICS, exposition
from chatserver.settings import Settings
from chatserver.store import log as rooms_log
from chatserver.store import registry
from chatserver.store.log import RoomLog
from chatserver.store.revocations import living_leases, revoke
from chatserver.store.sessions import Sessions


class Control:
    """The API's means: the store, by a command, a session, a room."""

    def __init__(
        self,
        call: Callable[[list[Any]], Awaitable[Any]],
        sessions: Sessions,
        room_log: RoomLog,
    ) -> None:
        self.call = call
        self.sessions = sessions
        self._room_log = room_log

    async def publish(self, event: Publish) -> Published:
        future: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
        self._room_log.publish(event, "-", _resolve(future), wanted=lambda: True)
        return await future

    async def read(
        self, room: str, before: int | None, after: int | None, limit: int
    ) -> tuple[Reading, bool]:
        """A page, as the command ``history`` gives it, and whether there is more behind it."""
        future: asyncio.Future[Reading] = asyncio.get_running_loop().create_future()
        self._room_log.read(
            room,
            _resolve(future),
            after=after,
            before=before,
            onwards=limit,
            backwards=limit,
            size=PAGE_BYTES,
            nearest=after is not None,
        )
        reading = await future
        return reading, has_more(reading, onwards=after is not None)


def _resolve(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    def done(outcome: Any) -> None:
        if future.done():
            return
        if isinstance(outcome, StoreUnavailable):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    return done


# --- the routes ----------------------------------------------------------------------------


def build(settings: Settings, control: Control, reports: pathlib.Path | None) -> ASGIApp:
    """The application, behind its door."""
    assert settings.control_key is not None
    api = FastAPI(
        title="chatserver control API",
        description="Log users in, revoke, publish and look. Times are milliseconds since the Unix "
        "epoch. Every error has one shape: {error: {code, message, path?}}.",
        version="1",
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Security(HTTPBearer(auto_error=False, description="CHATSERVER_CONTROL_KEY"))],
    )
    _add_sessions(api, control)
    _add_rooms(api, control, settings.frame_bytes)
    _add_metrics(api, reports, settings.workers)
    _add_health(api, control)
    _add_faults(api)
    _document(api)
    return Door(api, settings.control_key.get_secret_value().encode())


def _add_sessions(api: FastAPI, control: Control) -> None:
    @api.post("/v1/tokens", status_code=201, response_model=TokenPair, responses=errors(400))
    async def begin_session(given: NewSession) -> Response:
        """Start a session: somebody has logged in."""
        try:
            pair = await control.sessions.begin(given.user, given.roles, given.rooms)
        except ValueError as error:
            return fault(400, str(error))
        return answer(201, pair._asdict())

    @api.patch("/v1/sessions/{session}", response_model=Session, responses=errors(400, 404))
    async def change_rights(session: SessionPath, given: Rights) -> Response:
        """Change the rights of the session's next tokens; its clients are told to get one now."""
        try:
            family = await control.sessions.entitle(
                session,
                roles=given.roles,
                rooms=given.rooms,
                without_rooms="rooms" in given.model_fields_set and given.rooms is None,
            )
        except ValueError as error:
            return fault(400, str(error))
        if family is None:
            return fault(404)
        return answer(
            200,
            {
                "session": family.session,
                "user": family.user,
                "roles": list(family.roles),
                "rooms": family.rooms,
                "expires_at": family.expires_at * 1000,
            },
        )

    @api.delete("/v1/sessions/{session}", response_model=Revoked, responses=errors(400))
    async def end_session(session: SessionPath) -> Response:
        """Revoke the session: returns when every worker has applied it, or after 3 seconds."""
        outcome = await revoke(control.call, Kind.SESSION, session, reason="control API")
        return answer(200, outcome._asdict())

    @api.post("/v1/revocations", response_model=Revoked, responses=errors(400))
    async def revoke_anything(given: NewRevocation) -> Response:
        """Revoke a session, all that a user has by now, or one access token."""
        choices = {
            Kind.SESSION: given.session,
            Kind.USER: given.user,
            Kind.TOKEN: given.token_id,
        }
        named = [(kind, value) for kind, value in choices.items() if value is not None]
        if len(named) != 1:
            return fault(400, "Give exactly one of session, user and token_id.", "$")
        outcome = await revoke(control.call, *named[0], reason=given.reason)
        return answer(200, outcome._asdict())

    @api.get("/v1/sessions", response_model=ConnectedPage, responses=errors(400))
    async def connected_sessions(
        user: Annotated[str, Query(pattern=ID)],
        after: Annotated[str, Query(max_length=128, description="`next` of the last page")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """A user's sessions that are connected, with their connections."""
        entries = await registry.connections(control.call, user)
        found = [
            (session, list(group))
            for session, group in groupby(entries, key=lambda entry: entry.session)
            if session > after
        ]
        page = [
            {"session": session, "user": user, "connections": [_connection(e) for e in group]}
            for session, group in found[:limit]
        ]
        following = page[-1]["session"] if len(found) > limit else None
        return answer(200, {"sessions": page, "next": following})


def _connection(entry: registry.Entry) -> dict[str, object]:
    return {
        "connection": entry.connection,
        "worker": entry.worker,
        "connected_since": entry.since,
        "address": entry.address,
    }


class _Message(msgspec.Struct):
    """The one thing that must go out as it came in."""

    body: msgspec.Raw


def _add_rooms(api: FastAPI, control: Control, frame_bytes: int) -> None:
    @api.post(
        "/v1/rooms/{room}/messages",
        status_code=201,
        response_model=Place,
        response_model_exclude_none=True,
        responses=errors(400),
    )
    async def publish(room: RoomPath, given: NewMessage, request: Request) -> Response:
        """Publish as a user. Repeating a key stores nothing and gives the first place again."""
        body = msgspec.json.decode(await request.body(), type=_Message).body
        if len(bytes(body)) > frame_bytes:
            return fault(413)
        if frames.too_deep(bytes(body)):
            return fault(400, f"body is nested more than {frames.BODY_DEPTH} levels.", "$.body")
        head, tail = frames.message_parts(room, given.user, body, given.key)
        done = await control.publish(Publish(0, room, head, tail, given.user, given.key, echo=True))
        place: dict[str, object] = {
            "room": room,
            "epoch": done.epoch,
            "offset": done.offset,
            "ts": done.ts,
        }
        return answer(201, place | ({"duplicate": True} if done.duplicate else {}))

    @api.get("/v1/rooms/{room}/messages", response_model=Events, responses=errors(400))
    async def read(
        room: RoomPath,
        before: Annotated[Offset | None, Query()] = None,
        after: Annotated[Offset | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=256)] = 50,
    ) -> Response:
        """Page through the retained messages of a room; at most one of before and after."""
        if before is not None and after is not None:
            return fault(400, "Give at most one of before and after.", "$.after")
        reading, more = await control.read(room, before, after, limit)
        page = {
            "room": room,
            "epoch": reading.epoch,
            "offset": reading.top,
            "events": [frames.Fragment(event.payload) for event in reading.events],
            "more": more,
        }
        return answer(200, page)

    @api.get("/v1/rooms", response_model=RoomPage, responses=errors(400))
    async def rooms(
        after: Annotated[
            str, Query(pattern=r"^[0-9]{1,20}$", description="`next` of the last page")
        ] = "0",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """All rooms, in no order. A page may have more than the limit, or fewer, even none."""
        if int(after) >= 2**64:  # a cursor of SCAN, which the store would refuse
            return fault(400, "This is not the next of any page.", "$.after")
        found, following = await rooms_log.rooms(control.call, int(after), limit)
        return answer(200, {"rooms": [room._asdict() for room in found], "next": following})


def _add_metrics(api: FastAPI, reports: pathlib.Path | None, workers: int) -> None:
    @api.get(
        "/metrics",
        response_class=Response,
        responses=faults(401, 408, 413) | {200: {"content": {"text/plain": {}, OPENMETRICS: {}}}},
    )
    def metrics(request: Request) -> Response:
        """What the workers of this host have counted, for Prometheus: docs/metrics.md."""
        # No coroutine: it reads files, in a thread of its own.
        content, kind = exposition(reports, workers, request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": kind})


def _add_health(api: FastAPI, control: Control) -> None:
    @api.get("/v1/workers", response_model=Workers, responses=errors())
    async def workers() -> Response:
        """Every worker that serves, on all hosts."""
        leases = sorted(await living_leases(control.call))
        found = [
            {"worker": lease.worker, **lease.about, "renewed_at": lease.renewed_at}
            for lease in leases
        ]
        return answer(200, {"workers": found})

    @api.get(
        "/healthz",
        response_model=Health,
        response_model_exclude_none=True,
        responses=faults(408, 413),
    )
    async def healthz() -> Response:
        """This process answers."""
        return answer(200, {"status": "ok"})

    @api.get(
        "/readyz", response_model=Health, responses=faults(408, 413) | {503: {"model": Health}}
    )
    async def readyz() -> Response:
        """The store answers, too."""
        try:
            await control.call(["PING"])
        except StoreUnavailable:
            return answer(503, {"status": "unavailable", "store": "unreachable"})
        return answer(200, {"status": "ok", "store": "reachable"})


def _add_faults(api: FastAPI) -> None:
    async def http_fault(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        match error.status_code:
            case 405:
                return fault(405, Allow=", ".join(_methods(api, request.scope)))
            case 400:  # FastAPI could not parse the body at all.
                return fault(400, path="$")
            case status:
                return fault(status)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = first["loc"][1:]
        if place[:1] == ("body",):  # Behind it pydantic names its own types, level by level.
            place = place[:1]
        path = "$" + "".join(f".{part}" for part in place)
        return fault(400, f"{path}: {first['msg']}.", path)

    async def unavailable(_: Request, error: Exception) -> Response:
        return fault(503, Retry_After="1")

    async def failed(_: Request, error: Exception) -> Response:
        return fault(500)

    api.add_exception_handler(HTTPException, http_fault)
    api.add_exception_handler(RequestValidationError, invalid)
    api.add_exception_handler(StoreUnavailable, unavailable)
    api.add_exception_handler(Exception, failed)


def _methods(api: FastAPI, scope: Scope) -> list[str]:
    """Of all routes of a path: Starlette tells those of the first."""
    found: set[str] = set()
    for route in api.router.routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found)


def _document(api: FastAPI) -> None:
    """FastAPI documents a 422 of its own, which is never sent."""
    document = api.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
