"""What goes over the control API's wire, as pydantic checks it and the OpenAPI page shows it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from chatserver.core import frames

# Neither control characters nor surrogates, as in a token's claims.
ID = r"^[^\x00-\x1f\x7f-\x9f]{1,128}$"
Id = Annotated[str, Field(pattern=ID, min_length=1, max_length=128)]
Room = Annotated[str, Field(pattern=frames.ROOM_NAME.replace(r"\A", "^").replace(r"\Z", "$"))]
Offset = Annotated[int, Field(ge=0, le=frames.MAX_SAFE_INTEGER)]
SessionPath = Annotated[str, Path(pattern=ID, description="a session's id")]
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
