"""How the control API answers: JSON, and one shape for every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi.responses import Response
from pydantic import BaseModel

from chatserver.control.schema import Error

_CODES = {
    400: "invalid",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    500: "internal",
    503: "unavailable",
}
_MESSAGES = {
    400: "The request is not well formed; see path.",
    401: "Send the key of the control API: Authorization: Bearer <key>.",
    404: "There is no such thing.",
    405: "This path has no such method.",
    408: "The request's body did not come in time.",
    413: "The request is too large.",
    500: "The server failed to carry this out.",
    503: "The store did not answer: it may or may not have happened, and can be repeated.",
}


def answer(
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


def fault(
    status: int, message: str | None = None, path: str | None = None, **headers: str
) -> Response:
    told = {"code": _CODES.get(status, "invalid"), "message": message or _MESSAGES[status]}
    if path is not None:
        told["path"] = path
    return answer(status, {"error": told}, {k.replace("_", "-"): v for k, v in headers.items()})


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI page: how a route can fail."""
    return faults(*statuses, 401, 408, 413, 503)


def faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _MESSAGES[status]} for status in statuses}
