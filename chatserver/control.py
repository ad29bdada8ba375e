"""The control API: what operators and other services of the same system may ask and do.

HTTP on a port of its own, in a process of its own, for whoever holds the key. Everything that it
tells comes from the store, and everything it does goes there, so it needs nothing from a worker;
but for the metrics, which the workers of its host leave in files.
protocol.md, section 6, and the OpenAPI page at ``/docs``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import pathlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Annotated, Any

import msgspec
import orjson
import uvicorn
import uvloop
from fastapi import FastAPI, Path, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserver import telemetry
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
from chatserver.store.cluster import store_at
from chatserver.store.log import RoomLog
from chatserver.store.revocations import living_leases, revoke
from chatserver.store.sessions import Sessions

REQUEST_BYTES = 1_048_576
STOP_SECONDS = 5
"""How long requests under way may take when the process is told to stop."""
HEAR_SECONDS = 0.25
"""How long a request may take to follow its connection then."""

log = telemetry.logger(__name__)


def run(
    settings: Settings,
    sock: socket.socket,
    ready: Callable[[], None],
    reports: pathlib.Path | None = None,
) -> int:
    """Serve on a bound socket until SIGTERM or SIGHUP. Returns the exit code.

    ``ready`` is called once, when requests are answered. ``reports`` is the directory in which the
    workers tell what they count.
    """
    return uvloop.run(_serve(settings, sock, ready, reports))


async def _serve(
    settings: Settings,
    sock: socket.socket,
    ready: Callable[[], None],
    reports: pathlib.Path | None,
) -> int:
    assert settings.redis_url is not None
    store = store_at(settings.redis_url.get_secret_value())
    commands, room_log = store.lane(), RoomLog.of(settings, store)
    sessions = Sessions.of(settings, commands.call)
    app = build(settings, Control(commands.call, sessions, room_log), reports)
    # A lane that fails ends the process, which is started anew: its callers would wait for ever.
    async with asyncio.TaskGroup() as tasks:
        parts = store, commands, *room_log.lanes
        running = [tasks.create_task(part.run()) for part in parts]
        await _Server(settings, app, ready).serve(sockets=[sock])
        for task in running:
            task.cancel()
    return 0


class _Server(uvicorn.Server):
    """uvicorn, told to stop by us, and telling us when it serves."""

    def __init__(self, settings: Settings, app: ASGIApp, ready: Callable[[], None]) -> None:
        tls = settings.control_tls
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=STOP_SECONDS,
                ssl_certfile=settings.tls_certfile if tls else None,
                ssl_keyfile=settings.tls_keyfile if tls else None,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn would hang up on those whom it has accepted and not yet heard."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(HEAR_SECONDS)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the process by the signal, which is no exit code of ours."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.should_exit = True


# --- what it does --------------------------------------------------------------------------


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


# --- what goes over the wire ---------------------------------------------------------------

# Neither control characters nor surrogates, as in a token's claims.
_ID = r"^[^\x00-\x1f\x7f-\x9f]{1,128}$"
Id = Annotated[str, Field(pattern=_ID, min_length=1, max_length=128)]
Room = Annotated[str, Field(pattern=frames.ROOM_NAME.replace(r"\A", "^").replace(r"\Z", "$"))]
Offset = Annotated[int, Field(ge=0, le=frames.MAX_SAFE_INTEGER)]
SessionPath = Annotated[str, Path(pattern=_ID, description="a session's id")]
RoomPath = Annotated[
    str,
    Path(pattern=frames.ROOM_NAME.replace(r"\A", "^").replace(r"\Z", "$"), description="a name"),
]


class _Given(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class NewSession(_Given):
    user: Id
    roles: list[str] = ["member"]
    rooms: dict[str, str] | None = None


class Rights(_Given):
    """A field that is absent stays; ``rooms`` null takes the map away."""

    roles: list[str] | None = None
    rooms: dict[str, str] | None = None


class NewRevocation(_Given):
    """Exactly one of session, user and token_id."""

    session: Id | None = None
    user: Id | None = None
    token_id: Id | None = None
    reason: Annotated[str, Field(max_length=1000)] = ""


class NewMessage(_Given):
    user: Id
    body: JsonValue
    key: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class TokenPair(BaseModel):
    access_token: str
    refresh_token: str
    session: str
    expires_at: int
    refresh_expires_at: int


class Session(BaseModel):
    session: str
    user: str
    roles: list[str]
    rooms: dict[str, str] | None
    expires_at: int


class Revoked(BaseModel):
    closed: int
    complete: bool


class Connection(BaseModel):
    connection: str
    worker: str
    connected_since: int
    address: str


class Connected(BaseModel):
    session: str
    user: str
    connections: list[Connection]


class ConnectedPage(BaseModel):
    sessions: list[Connected]
    next: str | None


class RoomState(BaseModel):
    room: str
    epoch: str
    offset: int


class RoomPage(BaseModel):
    rooms: list[RoomState]
    next: str | None


class Place(BaseModel):
    room: str
    epoch: str
    offset: int
    ts: int
    duplicate: bool | None = None


class Events(BaseModel):
    room: str
    epoch: str
    offset: int
    events: list[dict[str, JsonValue]]
    more: bool


class Worker(BaseModel):
    worker: str
    host: str
    pid: int
    since: int
    connections: int
    rooms: int
    renewed_at: int


class Workers(BaseModel):
    workers: list[Worker]


class Health(BaseModel):
    status: str
    store: str | None = None


class Fault(BaseModel):
    code: str
    message: str
    path: str | None = None


class Error(BaseModel):
    error: Fault


_CODES = {
    400: "invalid",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    500: "internal",
    503: "unavailable",
}
_MESSAGES = {
    400: "The request is not well formed; see path.",
    401: "Send the key of the control API: Authorization: Bearer <key>.",
    404: "There is no such thing.",
    405: "This path has no such method.",
    413: "The request is too large.",
    500: "The server failed to carry this out.",
    503: "The store did not answer: it may or may not have happened, and can be repeated.",
}


def _answer(
    status: int, body: Mapping[str, Any] | BaseModel, headers: Mapping[str, str] | None = None
) -> Response:
    if isinstance(body, BaseModel):
        body = body.model_dump(exclude_none=False)
    return Response(
        orjson.dumps(body) + b"\n",
        status,
        {"Cache-Control": "no-store", **(headers or {})},
        "application/json",
    )


def _fault(
    status: int, message: str | None = None, path: str | None = None, **headers: str
) -> Response:
    fault = {"code": _CODES.get(status, "invalid"), "message": message or _MESSAGES[status]}
    if path is not None:
        fault["path"] = path
    return _answer(status, {"error": fault}, {k.replace("_", "-"): v for k, v in headers.items()})


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI page: how a route can fail."""
    return _faults(*statuses, 401, 413, 503)


def _faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _MESSAGES[status]} for status in statuses}


_WITH_BODY = ("POST", "PATCH")
_GUARDED = ("/v1", "/metrics")


class _Door:
    """Outside of everything: the key, and a body that is bounded and strict JSON.

    Where a request has no meaning for a body, it is read and not looked at.
    """

    def __init__(self, app: ASGIApp, key: bytes) -> None:
        self._app = app
        self._key = hashlib.sha256(key).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def unkept(message: Message) -> None:
            """FastAPI's own pages are not to be kept, either."""
            if message["type"] == "http.response.start":
                rest = [pair for pair in message["headers"] if pair[0] != b"cache-control"]
                message["headers"] = [*rest, (b"cache-control", b"no-store")]
            await send(message)

        refusal, body = await self._admit(scope, receive)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        told = False

        async def again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        # Whatever a client calls it, it is JSON: curl -d says it was a form.
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        await self._app({**scope, "headers": headers}, again, unkept)

    async def _admit(self, scope: Scope, receive: Receive) -> tuple[Response | None, bytes]:
        if scope["path"].startswith(_GUARDED) and not self._knows_key(scope):
            return _fault(401, WWW_Authenticate="Bearer"), b""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            if len(body) > REQUEST_BYTES:
                return _fault(413, Connection="close"), b""
            if not message.get("more_body"):
                break
        if body and scope["method"] in _WITH_BODY:
            try:
                orjson.loads(body)
            except orjson.JSONDecodeError:
                return _fault(400, "The body is not JSON (RFC 8259).", "$"), b""
        return None, bytes(body)

    def _knows_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        # Of the digests, so that not even the length shows in the time.
        return hmac.compare_digest(digest, self._key) and scheme.lower() == b"bearer"


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
    return _Door(api, settings.control_key.get_secret_value().encode())


def _add_sessions(api: FastAPI, control: Control) -> None:
    @api.post("/v1/tokens", status_code=201, response_model=TokenPair, responses=_errors(400))
    async def begin_session(given: NewSession) -> Response:
        """Start a session: somebody has logged in."""
        try:
            pair = await control.sessions.begin(given.user, given.roles, given.rooms)
        except ValueError as error:
            return _fault(400, str(error))
        return _answer(201, pair._asdict())

    @api.patch("/v1/sessions/{session}", response_model=Session, responses=_errors(400, 404))
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
            return _fault(400, str(error))
        if family is None:
            return _fault(404)
        return _answer(
            200,
            {
                "session": family.session,
                "user": family.user,
                "roles": list(family.roles),
                "rooms": family.rooms,
                "expires_at": family.expires_at * 1000,
            },
        )

    @api.delete("/v1/sessions/{session}", response_model=Revoked, responses=_errors(400))
    async def end_session(session: SessionPath) -> Response:
        """Revoke the session: returns when every worker has applied it, or after 3 seconds."""
        outcome = await revoke(control.call, Kind.SESSION, session, reason="control API")
        return _answer(200, outcome._asdict())

    @api.post("/v1/revocations", response_model=Revoked, responses=_errors(400))
    async def revoke_anything(given: NewRevocation) -> Response:
        """Revoke a session, all that a user has by now, or one access token."""
        choices = {
            Kind.SESSION: given.session,
            Kind.USER: given.user,
            Kind.TOKEN: given.token_id,
        }
        named = [(kind, value) for kind, value in choices.items() if value is not None]
        if len(named) != 1:
            return _fault(400, "Give exactly one of session, user and token_id.", "$")
        outcome = await revoke(control.call, *named[0], reason=given.reason)
        return _answer(200, outcome._asdict())

    @api.get("/v1/sessions", response_model=ConnectedPage, responses=_errors(400))
    async def connected_sessions(
        user: Annotated[str, Query(pattern=_ID)],
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
        return _answer(200, {"sessions": page, "next": following})


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
        responses=_errors(400),
    )
    async def publish(room: RoomPath, given: NewMessage, request: Request) -> Response:
        """Publish as a user. Repeating a key stores nothing and gives the first place again."""
        body = msgspec.json.decode(await request.body(), type=_Message).body
        if len(bytes(body)) > frame_bytes:
            return _fault(413)
        if frames.too_deep(bytes(body)):
            return _fault(400, f"body is nested more than {frames.BODY_DEPTH} levels.", "$.body")
        head, tail = frames.message_parts(room, given.user, body, given.key)
        done = await control.publish(Publish(0, room, head, tail, given.user, given.key, echo=True))
        place: dict[str, object] = {
            "room": room,
            "epoch": done.epoch,
            "offset": done.offset,
            "ts": done.ts,
        }
        return _answer(201, place | ({"duplicate": True} if done.duplicate else {}))

    @api.get("/v1/rooms/{room}/messages", response_model=Events, responses=_errors(400))
    async def read(
        room: RoomPath,
        before: Annotated[Offset | None, Query()] = None,
        after: Annotated[Offset | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=256)] = 50,
    ) -> Response:
        """Page through the retained messages of a room; at most one of before and after."""
        if before is not None and after is not None:
            return _fault(400, "Give at most one of before and after.", "$.after")
        reading, more = await control.read(room, before, after, limit)
        page = {
            "room": room,
            "epoch": reading.epoch,
            "offset": reading.top,
            "events": [frames.Fragment(event.payload) for event in reading.events],
            "more": more,
        }
        return _answer(200, page)

    @api.get("/v1/rooms", response_model=RoomPage, responses=_errors(400))
    async def rooms(
        after: Annotated[
            str, Query(pattern=r"^[0-9]{1,20}$", description="`next` of the last page")
        ] = "0",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """All rooms, in no order. A page may have more than the limit, or fewer, even none."""
        if int(after) >= 2**64:  # a cursor of SCAN, which the store would refuse
            return _fault(400, "This is not the next of any page.", "$.after")
        found, following = await rooms_log.rooms(control.call, int(after), limit)
        return _answer(200, {"rooms": [room._asdict() for room in found], "next": following})


def _add_metrics(api: FastAPI, reports: pathlib.Path | None, workers: int) -> None:
    @api.get(
        "/metrics",
        response_class=Response,
        responses=_faults(401, 413) | {200: {"content": {"text/plain": {}, OPENMETRICS: {}}}},
    )
    def metrics(request: Request) -> Response:
        """What the workers of this host have counted, for Prometheus: docs/metrics.md."""
        # No coroutine: it reads files, in a thread of its own.
        content, kind = exposition(reports, workers, request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": kind})


def _add_health(api: FastAPI, control: Control) -> None:
    @api.get("/v1/workers", response_model=Workers, responses=_errors())
    async def workers() -> Response:
        """Every worker that serves, on all hosts."""
        leases = sorted(await living_leases(control.call))
        found = [
            {"worker": lease.worker, **lease.about, "renewed_at": lease.renewed_at}
            for lease in leases
        ]
        return _answer(200, {"workers": found})

    @api.get(
        "/healthz",
        response_model=Health,
        response_model_exclude_none=True,
        responses=_faults(413),
    )
    async def healthz() -> Response:
        """This process answers."""
        return _answer(200, {"status": "ok"})

    @api.get("/readyz", response_model=Health, responses=_faults(413) | {503: {"model": Health}})
    async def readyz() -> Response:
        """The store answers, too."""
        try:
            await control.call(["PING"])
        except StoreUnavailable:
            return _answer(503, {"status": "unavailable", "store": "unreachable"})
        return _answer(200, {"status": "ok", "store": "reachable"})


def _add_faults(api: FastAPI) -> None:
    async def http_fault(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        match error.status_code:
            case 405:
                return _fault(405, Allow=", ".join(_methods(api, request.scope)))
            case 400:  # FastAPI could not parse the body at all.
                return _fault(400, path="$")
            case status:
                return _fault(status)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = first["loc"][1:]
        if place[:1] == ("body",):  # Behind it pydantic names its own types, level by level.
            place = place[:1]
        path = "$" + "".join(f".{part}" for part in place)
        return _fault(400, f"{path}: {first['msg']}.", path)

    async def unavailable(_: Request, error: Exception) -> Response:
        return _fault(503, Retry_After="1")

    async def failed(_: Request, error: Exception) -> Response:
        return _fault(500)

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
