"""The log: one line per event, and nothing in it that opens a door."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from chatserver import telemetry

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, peers = logging.getLogger(), logging.getLogger("websockets")
    before = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers, root.level = before
    peers.handlers, peers.propagate = [], True


@pytest.fixture
def stream() -> io.StringIO:
    out = io.StringIO()
    telemetry.configure("info", out)
    return out


def only_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def test_the_key_of_the_control_api_is_not_shown(stream: io.StringIO) -> None:
    telemetry.logger("x").info("e", control_key="k" * 40, about={"control_key": "k" * 40})

    assert "kkk" not in stream.getvalue()


def test_an_event_is_one_json_object_on_one_line(stream: io.StringIO) -> None:
    telemetry.logger("hub").info("joined", room="general", text="two\nlines", members=3)

    line = only_line(stream)

    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "joined",
        "level": "info",
        "part": "hub",
        "room": "general",
        "text": "two\nlines",
        "members": 3,
    }


def test_on_a_terminal_it_is_key_value_and_control_characters_stay_inside_quotes() -> None:
    terminal = Terminal()
    telemetry.configure("info", terminal)

    telemetry.logger("hub").info("joined", user="bob", text="a\x1b[2Jb\nc", empty="", n=1)

    (line,) = terminal.getvalue().splitlines()
    assert line[8:] == (' info joined part=hub user=bob text="a\\u001b[2Jb\\nc" empty="" n=1')


def test_what_is_below_the_level_is_left_out(stream: io.StringIO) -> None:
    telemetry.logger("hub").debug("detail")

    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "text",
    [
        JWT,
        f"Authorization: Bearer {JWT}",
        "Authorization: bearer c2lnbmF0dXJl",
        "trade rt1.abcdefghijklmnop.s-1.3.c2lnbmF0dXJl for the next",
        "rt1.abcdefghijklmnop.s-1.3.c2lnbmF0dXJl",
        "chat.v1, bearer.c2lnbmF0dXJl",
        "redis://user:c2lnbmF0dXJl@store:6379/0",
        "redis://:c2lnb/mF0dXJl@x@store:6379/0",
        "/v1/ws?token=c2lnbmF0dXJl&x=1",
        "/v1/ws?access_token=c2lnbmF0dXJl",
        JWT[: len(JWT) - 8] + "\u2026",
    ],
)
@pytest.mark.parametrize("place", ["event", "value", "nested", "bytes", "repr", "exception"])
def test_a_credential_shows_nowhere(stream: io.StringIO, text: str, place: str) -> None:
    log = telemetry.logger("hub")
    match place:
        case "event":
            log.info(text)
        case "value":
            log.info("refused", reason=text)
        case "nested":
            log.info("refused", headers=[("x", text)], more={"deep": {"er": [text]}})
        case "bytes":
            log.info("refused", raw=text.encode())
        case "repr":
            log.info("refused", error=ValueError(text))
        case "exception":
            try:
                raise ValueError(text)
            except ValueError:
                log.exception("failed")

    written = stream.getvalue()

    assert telemetry.REDACTED in written
    for part in ("c2lnb", "mF0dXJl", "eyJ"):
        assert part not in written


@pytest.mark.parametrize("key", ["token", "Secret", "authorization", "password", "access_token"])
def test_a_value_under_a_telling_name_is_left_out_whatever_it_looks_like(
    stream: io.StringIO, key: str
) -> None:
    telemetry.logger("hub").info("seen", **{key: "tomato"}, inner={key: "tomato"}, token_id="t-1")

    line = only_line(stream)

    assert line[key] == line["inner"][key] == telemetry.REDACTED
    assert line["token_id"] == "t-1"


def test_an_exception_is_logged_with_its_trace_but_without_local_variables(
    stream: io.StringIO,
) -> None:
    def fail() -> None:
        tomato = "local value"
        raise RuntimeError("out of seats " + str(len(tomato)))

    try:
        fail()
    except RuntimeError:
        telemetry.logger("hub").exception("failed")

    line = only_line(stream)

    assert "RuntimeError: out of seats" in line["exception"]
    assert "in fail" in line["exception"]
    assert "'local value'" not in line["exception"].replace('"local value"', "")


@pytest.mark.parametrize("text", ["a" * 2_000_000, "eyJ" * 700_000, "://" * 700_000])
def test_a_huge_value_is_cut(stream: io.StringIO, text: str) -> None:
    telemetry.logger("hub").info("big", text=text)

    assert len(stream.getvalue()) < 2 * telemetry.LONGEST_VALUE


def test_numbers_that_json_cannot_say_do_no_harm(stream: io.StringIO) -> None:
    telemetry.logger("hub").info("odd", nan=float("nan"), endless=float("-inf"), long=10**5000)

    line = only_line(stream)

    assert {line["nan"], line["endless"], line["long"]} == {"[out of range]"}


def test_other_libraries_log_through_the_same_door(stream: io.StringIO) -> None:
    logging.getLogger("asyncio").error("Task failed: %s", f"Bearer {JWT}")

    line = only_line(stream)

    assert line["part"] == "asyncio"
    assert line["text"] == f"Task failed: Bearer {telemetry.REDACTED}"


def test_a_foreign_line_with_too_few_arguments_is_logged_as_it_stands(stream: io.StringIO) -> None:
    record = logging.LogRecord("lib", logging.ERROR, "", 0, "%s %s", ("one",), None)
    (foreign,) = (each for each in logging.getLogger().handlers if not hasattr(each, "records"))

    foreign.emit(record)

    assert only_line(stream)["text"] == "%s %s"


def test_a_peer_that_goes_away_is_no_event(stream: io.StringIO) -> None:
    logging.getLogger("websockets.server").error("connection handler failed")

    assert stream.getvalue() == ""


def test_a_log_that_nobody_reads_any_more_is_no_reason_to_fail(stream: io.StringIO) -> None:
    stream.close()

    telemetry.logger("hub").info("still here")
