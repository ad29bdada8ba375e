from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from chatserver.core import errors, frames
from chatserver.core.errors import MESSAGES, ReplyCode
from chatserver.core.frames import (
    BODY_DEPTH,
    MAX_SAFE_INTEGER,
    Command,
    History,
    InvalidCommand,
    Join,
    Leave,
    Logout,
    NotAFrame,
    NotText,
    Ping,
    Refresh,
    Send,
    Since,
    message_parts,
    parse_command,
)

EMOJI = "\N{GRINNING FACE}"


def encoded(**members: object) -> bytes:
    return json.dumps(members, ensure_ascii=False).encode()


def parse(**members: object) -> Command:
    return parse_command(encoded(**members))


def invalid(data: bytes) -> InvalidCommand:
    with pytest.raises(InvalidCommand) as refused:
        parse_command(data)
    return refused.value


def complaint(**members: object) -> tuple[ReplyCode, object, str | None]:
    error = invalid(encoded(**members))
    return error.code, error.id, error.path


def send_of(body: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    return b'{"type":"send","id":1,"room":"a"%b,"body":%b%b}' % (before, body, after)


def body_of(command: Command) -> bytes:
    assert isinstance(command, Send)
    return bytes(command.body)


# --- commands ------------------------------------------------------------------------------


def test_a_join_says_where_from_and_how_much() -> None:
    plain = parse(type="join", room="general")
    full = parse(type="join", id=1, room="a", since={"epoch": "k3f9", "offset": 12344}, last=256)

    assert plain == Join(room="general")
    assert full == Join(id=1, room="a", since=Since("k3f9", 12344), last=256)


def test_a_leave_names_a_room() -> None:
    assert parse(type="leave", id="x", room="general") == Leave(id="x", room="general")


def test_a_send_goes_to_one_room_and_is_echoed() -> None:
    command = parse(type="send", room="general", body=None)

    assert isinstance(command, Send)
    assert (command.room, command.rooms, command.key) == ("general", UNSET, UNSET)
    assert command.echo
    assert bytes(command.body) == b"null"


def test_a_cross_post_goes_to_rooms_in_the_order_given() -> None:
    command = parse(type="send", id=1, rooms=["b", "a"], body={}, key="k", echo=False)

    assert isinstance(command, Send)
    assert (command.room, command.rooms, command.key) == (UNSET, ("b", "a"), "k")
    assert not command.echo


def test_a_page_of_history_is_before_or_after_an_offset() -> None:
    assert parse(type="history", room="a") == History(room="a", limit=50)
    assert parse(type="history", room="a", before=9) == History(room="a", before=9)
    assert parse(type="history", room="a", after=0, limit=1) == History(room="a", after=0, limit=1)
    assert complaint(type="history", id=1, room="a", before=9, after=0) == (
        ReplyCode.INVALID,
        1,
        "$.after",
    )


def test_a_refresh_carries_a_token_and_a_ping_nothing() -> None:
    assert parse(type="refresh", id=1, token="x.y.z") == Refresh(id=1, token="x.y.z")
    assert parse(type="ping", id=1) == Ping(id=1)


def test_unknown_fields_are_ignored() -> None:
    command = parse(
        type="join", id=1, room="a", user="eve", roles=["admin"], ts=1, offset=5, x={"y": [1]}
    )

    assert command == Join(id=1, room="a")
    assert parse(type="join", room="a", since={"epoch": "e", "offset": 1, "x": 2}) == Join(
        room="a", since=Since("e", 1)
    )


@pytest.mark.parametrize(
    "kind",
    [
        "edit",
        "delete",
        "react",
        "typing",
        "read",
        "presence",
        "kick",
        "ban",
        "mute",
        "ack",
        "message",
        "welcome",
        "",
        "Join",
        "join ",
        "__class__",
    ],
)
def test_another_type_is_unknown(kind: str) -> None:
    assert complaint(type=kind, id=7, room="a") == (ReplyCode.UNKNOWN_TYPE, 7, None)
    assert complaint(type=kind) == (ReplyCode.UNKNOWN_TYPE, None, None)


@pytest.mark.parametrize("kind", [None, 1, True, ["ping"], {"type": "ping"}])
def test_a_type_that_is_no_string_is_invalid(kind: object) -> None:
    assert complaint(type=kind, id=7) == (ReplyCode.INVALID, 7, "$.type")


def test_a_type_must_be_there() -> None:
    assert complaint(id=7) == (ReplyCode.INVALID, 7, "$.type")
    assert complaint() == (ReplyCode.INVALID, None, "$.type")


# --- ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [1, MAX_SAFE_INTEGER, "a", "x" * 64, EMOJI * 64, "\0", "1"])
def test_an_id_is_a_positive_integer_or_a_short_string(id: int | str) -> None:
    assert parse(type="ping", id=id).reply_to == id
    assert complaint(type="nope", id=id) == (ReplyCode.UNKNOWN_TYPE, id, None)


def test_a_command_without_an_id_wants_no_reply() -> None:
    assert parse(type="ping").reply_to is None


@pytest.mark.parametrize(
    "id",
    [
        b"0",
        b"-1",
        b"-0",
        b"1.0",
        b"1e3",
        b"9007199254740992",
        b"18446744073709551616",
        b"1" * 400,
        b"1" * 5000,
        b"1e400",
        b"-1e400",
        b'""',
        b'"%b"' % (b"x" * 65),
        b'"\\ud800"',
        b"null",
        b"true",
        b"[1]",
        b'{"id":1}',
    ],
)
@pytest.mark.parametrize("kind", [b"ping", b"nope"])
def test_what_is_no_id_is_not_answered_to(id: bytes, kind: bytes) -> None:
    error = invalid(b'{"type":"%b","id":%b}' % (kind, id))

    assert error.id is None


def test_the_last_of_two_ids_counts() -> None:
    assert parse_command(b'{"type":"ping","id":1,"id":2}').reply_to == 2
    assert invalid(b'{"type":"nope","id":1,"id":2}').id == 2


# --- fields --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "room",
    ["a", "0", "general", "A.b_c:d@e+f-g", "dm:alice:bob@x.org", "a" * 128, "__proto__"[2:]],
)
def test_a_room_name_is_of_plain_characters(room: str) -> None:
    assert parse(type="leave", room=room) == Leave(room=room)


@pytest.mark.parametrize(
    "room",
    [
        "",
        "a" * 129,
        "a" * 10_000,
        "_a",
        ".a",
        "-a",
        "__proto__",
        "a b",
        "a*",
        "a/b",
        "{a}",
        "a\n",
        "\na",
        "a\r\nb",
        "a\0",
        "é",
        "а",  # Cyrillic
        EMOJI,
        None,
        1,
        ["a"],
    ],
)
@pytest.mark.parametrize(
    "members",
    [
        {"type": "join"},
        {"type": "leave"},
        {"type": "send", "body": 1},
        {"type": "history"},
    ],
)
def test_any_other_room_name_is_invalid(members: dict[str, object], room: object) -> None:
    assert complaint(**members, id=1, room=room) == (ReplyCode.INVALID, 1, "$.room")


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"type": "join"}, "$.room"),
        ({"type": "join", "room": "a", "last": -1}, "$.last"),
        ({"type": "join", "room": "a", "last": 257}, "$.last"),
        ({"type": "join", "room": "a", "last": "1"}, "$.last"),
        ({"type": "join", "room": "a", "since": None}, "$.since"),
        ({"type": "join", "room": "a", "since": {}}, "$.since.epoch"),
        ({"type": "join", "room": "a", "since": {"epoch": "e"}}, "$.since.offset"),
        ({"type": "join", "room": "a", "since": {"epoch": "", "offset": 0}}, "$.since.epoch"),
        ({"type": "join", "room": "a", "since": {"epoch": "e" * 65, "offset": 0}}, "$.since.epoch"),
        ({"type": "join", "room": "a", "since": {"epoch": "e", "offset": -1}}, "$.since.offset"),
        ({"type": "join", "room": "a", "since": {"epoch": "e", "offset": 2**53}}, "$.since.offset"),
        ({"type": "join", "room": "a", "since": {"epoch": "e", "offset": 2**70}}, "$.since.offset"),
        ({"type": "leave"}, "$.room"),
        ({"type": "send", "room": "a"}, "$.body"),
        ({"type": "send", "body": 1}, "$.room"),
        ({"type": "send", "body": 1, "room": "a", "rooms": ["b"]}, "$.room"),
        ({"type": "send", "body": 1, "rooms": []}, "$.rooms"),
        ({"type": "send", "body": 1, "rooms": "a"}, "$.rooms"),
        ({"type": "send", "body": 1, "rooms": [f"r{n}" for n in range(17)]}, "$.rooms"),
        ({"type": "send", "body": 1, "rooms": ["a", "b", "a"]}, "$.rooms"),
        ({"type": "send", "body": 1, "rooms": ["a", "b c"]}, "$.rooms[1]"),
        ({"type": "send", "body": 1, "room": "a", "key": ""}, "$.key"),
        ({"type": "send", "body": 1, "room": "a", "key": "k" * 65}, "$.key"),
        ({"type": "send", "body": 1, "room": "a", "key": 5}, "$.key"),
        ({"type": "send", "body": 1, "room": "a", "key": None}, "$.key"),
        ({"type": "send", "body": 1, "room": "a", "echo": 0}, "$.echo"),
        ({"type": "history"}, "$.room"),
        ({"type": "history", "room": "a", "limit": 0}, "$.limit"),
        ({"type": "history", "room": "a", "limit": 257}, "$.limit"),
        ({"type": "history", "room": "a", "limit": 1.5}, "$.limit"),
        ({"type": "history", "room": "a", "before": -1}, "$.before"),
        ({"type": "history", "room": "a", "after": "1"}, "$.after"),
        ({"type": "refresh"}, "$.token"),
        ({"type": "refresh", "token": 1}, "$.token"),
        ({"type": "refresh", "token": None}, "$.token"),
    ],
)
def test_a_missing_or_wrong_field_is_invalid_at_its_path(
    members: dict[str, object], path: str
) -> None:
    assert complaint(**members, id=3) == (ReplyCode.INVALID, 3, path)
    assert complaint(**members) == (ReplyCode.INVALID, None, path)


def test_sixteen_different_rooms_are_a_cross_post() -> None:
    rooms = [f"r{n}" for n in range(16)]

    command = parse(type="send", rooms=rooms, body=1)

    assert isinstance(command, Send)
    assert command.rooms == tuple(rooms)


# --- what is no frame ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"\xff", b'{"type":"ping\xc3"}', b'"\xed\xa0\x80"', b"\xc0\x80", b'{"type":"ping"}\xfe'],
)
def test_bytes_that_are_not_utf_8_are_not_text(data: bytes) -> None:
    with pytest.raises(NotText):
        parse_command(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"hello",
        b"1",
        b"null",
        b'"ping"',
        b"[]",
        b'[{"type":"ping"}]',
        b'{"type":"ping"',
        b'{"type":"ping"}}',
        b'{"type":"ping"}{"type":"ping"}',
        b'{"type":"ping",}',
        b"{'type':'ping'}",
        b'{"type":"ping","x":NaN}',
        b'{"type":"ping","x":-Infinity}',
        b'{"type":"send","room":"a","body":NaN}',
        b'{"type":"ping","x":01}',
        b'{"type":"ping","x":"\n"}',
        b'{"type":"ping"} // hello',
        b"\xef\xbb\xbf" + b'{"type":"ping"}',
        b"\0",
        b"1" * 5000,
        b'["\\ud800"]',
        b"[1e400]",
        b"[" * 500 + b"]" * 500,
        b"[" * 30_000 + b"]" * 30_000,
        b"[" * 30_000,
        b'{"a":' * 10_000,
        b'{"a":[],"b":' + b"[" * 30_000,
        b'{"a":' + b"[" * 30_000 + b"}" * 30_000 + b",}",
    ],
)
def test_text_that_is_not_one_json_object_is_no_frame(data: bytes) -> None:
    with pytest.raises(NotAFrame):
        parse_command(data)


def test_white_space_around_the_object_is_json() -> None:
    assert parse_command(b' \r\n\t{ "type" : "ping" }\n') == Ping()


# --- bodies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"0",
        b"-0.0",
        b"1E+2",
        b"1.10",
        b"123456789012345678901234567890",
        b"1" + b"0" * 308,
        b"0." + b"1" * 5000,
        b"1e-400",
        b'""',
        b'"\\u0000\\/\\ud83d\\ude00"',
        b'"\\u0041A\xc3\xa9\xe2\x80\xa8"',
        b"[ 1 ,\t2 ]",
        b'{ "b":1,\n "a":2, "b":3 }',
        b'{"__proto__":{},"constructor":null,"":0}',
        b'{"type":"welcome","room":"b","id":9}',
    ],
)
def test_a_body_comes_out_byte_for_byte(body: bytes) -> None:
    assert body_of(parse_command(send_of(body))) == body
    assert body_of(parse_command(send_of(b" \n" + body + b"\t "))) == body


@pytest.mark.parametrize(
    "body",
    [
        b"1e400",
        b"-1e309",
        b"[1e400]",
        b"1" * 400,
        b"1" * 5000,
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'{"\\udfff":1}',
        b'{"a":1e400,"a":1}',
    ],
)
def test_a_body_that_others_could_not_read_is_invalid(body: bytes) -> None:
    error = invalid(send_of(body))

    assert (error.code, error.id, error.path) == (ReplyCode.INVALID, 1, "$.body")


def test_what_others_could_not_read_is_invalid_outside_a_body_too() -> None:
    error = invalid(b'{"type":"ping","id":1,"x":1e400}')

    assert (error.code, error.id, error.path) == (ReplyCode.INVALID, 1, "$")


def test_the_body_that_counts_is_the_last_one() -> None:
    assert body_of(parse_command(send_of(b"1", before=b',"body":[ 2 ]'))) == b"1"


def test_a_member_s_name_may_be_spelled_with_escapes() -> None:
    assert body_of(parse_command(b'{"type":"send","room":"a","b\\u006fdy":[1 ]}')) == b"[1 ]"


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    "body",
    [
        nested(64),
        b'{"a":' * 63 + b"{}" + b"}" * 63,
        b"[%b,%b]" % (nested(63), nested(63)),
        b"[%b]" % b",".join([b"[]"] * 500),
        b'["%b"]' % nested(500),
        b'{"%b":1}' % (b'\\"[' * 500),
        b'["\\\\",%b,"\\"["]' % nested(63),
    ],
)
def test_a_body_of_sixty_four_levels_is_accepted(body: bytes) -> None:
    assert body_of(parse_command(send_of(body))) == body


@pytest.mark.parametrize(
    "body",
    [
        nested(65),
        nested(900),
        nested(1024),
        nested(1025),
        nested(30_000),
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"[1,%b]" % nested(64),
        b'["\\"",%b]' % nested(64),
        # Of two members of one name a reader may keep either, and has to read both.
        b'{"a":%b,"a":1}' % nested(64),
        b'{"a":%b,"a":1}' % nested(900),
    ],
)
def test_a_deeper_body_is_invalid_and_its_command_answered(body: bytes) -> None:
    error = invalid(send_of(body))

    assert (error.code, error.id, error.path) == (ReplyCode.INVALID, 1, "$.body")


@pytest.mark.parametrize("levels", [1030, 30_000])
def test_an_unknown_member_nested_without_end_is_answered(levels: int) -> None:
    for data in (
        b'{"type":"ping","id":5,"x":%b}' % nested(levels),
        b'{"x":%b,"type":"ping","id":5}' % nested(levels),
    ):
        error = invalid(data)

        assert (error.code, error.id) == (ReplyCode.INVALID, 5)


@pytest.mark.parametrize("levels", [900, 1000, 1020])
def test_an_unknown_member_nested_very_deep_is_passed_over_or_refused(levels: int) -> None:
    """How deep msgspec goes depends on Python's version; the command is answered either way."""
    for data in (
        b'{"type":"ping","id":5,"x":%b}' % nested(levels),
        b'{"x":%b,"type":"ping","id":5}' % nested(levels),
    ):
        try:
            assert parse_command(data).reply_to == 5
        except InvalidCommand as error:
            assert (error.code, error.id) == (ReplyCode.INVALID, 5)  # noqa: PT017


# --- properties of whatever comes ----------------------------------------------------------


def levels_of(raw: bytes) -> int:
    """How deep the brackets outside strings go."""
    depth = deepest = 0
    in_string = escaped = False
    for byte in raw:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            else:
                in_string = byte != 0x22
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def test_levels_are_counted_outside_strings() -> None:
    assert levels_of(b"1") == 0
    assert levels_of(b"[]") == 1
    assert levels_of(b'{"[\\"[":[1]}') == 2


def no_constant(name: str) -> float:
    raise ValueError(name)


def document_of(data: bytes) -> Any:
    """The JSON text as the RFC has it, numbers however large. Raises ValueError."""
    return json.loads(
        data.decode(),
        parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits),
        parse_constant=no_constant,
    )


def id_sent(document: dict[str, Any]) -> int | str | None:
    """The id of the command, if it is one by protocol.md."""
    value = document.get("id")
    if type(value) is int and 1 <= value < 2**53:
        return value
    if type(value) is str and 1 <= len(value) <= 64 and not re.search("[\ud800-\udfff]", value):
        return value
    return None


def check(data: bytes) -> None:
    """Every promise of ``parse_command`` about these bytes."""
    try:
        command = parse_command(data)
    except NotText:
        with pytest.raises(UnicodeDecodeError):
            data.decode()
    except NotAFrame:
        assert not is_object(data)
    except InvalidCommand as refused:
        check_refusal(data, refused)
    else:
        check_command(data, command)


def is_object(data: bytes) -> bool:
    try:
        return isinstance(document_of(data), dict)
    except ValueError:
        return False


def check_refusal(data: bytes, refused: InvalidCommand) -> None:
    sent = id_sent(document_of(data))

    assert (type(refused.id), refused.id) == (type(sent), sent)
    assert refused.code in (ReplyCode.INVALID, ReplyCode.UNKNOWN_TYPE)
    assert (refused.path is not None) is (refused.code is ReplyCode.INVALID)
    assert frames.error(refused.code, id=refused.id, path=refused.path)


def check_command(data: bytes, command: Command) -> None:
    document = json.loads(data)
    sent = id_sent(document)
    assert (type(command.reply_to), command.reply_to) == (type(sent), sent)
    assert (
        type(command)
        is {
            "join": Join,
            "leave": Leave,
            "send": Send,
            "history": History,
            "refresh": Refresh,
            "logout": Logout,
            "ping": Ping,
        }[document["type"]]
    )
    if isinstance(command, Send):
        raw = bytes(command.body)
        assert raw in data
        assert json.loads(raw) == document["body"]
        assert levels_of(raw) <= BODY_DEPTH
        head, tail = message_parts("a", "u", command.body, None)
        event = head + b'1,"ts":2' + tail
        assert json.loads(event)["body"] == document["body"]
        orjson.loads(event)


IDS = st.one_of(
    st.integers(1, MAX_SAFE_INTEGER),
    st.text(min_size=1, max_size=64),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(), max_size=70),
)
ROOMS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._:@+-]{0,5}\Z") | st.text(max_size=5)
OFFSETS = st.integers(0, 2**53) | st.integers()
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def members(kind: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    optional = {name.rstrip("_"): of for name, of in fields.items() if name.endswith("_")}
    required = {name: of for name, of in fields.items() if not name.endswith("_")}
    return st.fixed_dictionaries({"type": st.just(kind), **required}, optional=optional)


COMMANDS = st.one_of(
    members(
        "join",
        room=ROOMS,
        id_=IDS,
        since_=st.fixed_dictionaries({"epoch": st.text(max_size=5), "offset": OFFSETS}),
        last_=st.integers(-1, 257),
    ),
    members("leave", room=ROOMS, id_=IDS),
    members("send", room=ROOMS, body=JSON, id_=IDS, key_=st.text(max_size=5), echo_=st.booleans()),
    members("send", rooms=st.lists(ROOMS, max_size=17), body=JSON, id_=IDS, x_=JSON),
    members("history", room=ROOMS, id_=IDS, before_=OFFSETS, after_=OFFSETS, limit_=OFFSETS),
    members("refresh", token=st.text(max_size=20), id_=IDS),
    members("ping", id_=IDS, x_=JSON),
    members("logout", id_=IDS),
)
PIECES = st.sampled_from(
    [
        b'"id":2,',
        b'"id":1e400,',
        b'"body":[[]],',
        b'"body":NaN,',
        b'"room":"b",',
        b'"type":"send",',
        b'"type":"ping",',
        b'"x":' + b"1" * 5000 + b",",
        b'"x":' + b"[" * 60 + b"]" * 60 + b",",
        b'"x":' + b"[" * 400 + b"]" * 400 + b",",
        b'"body":{"a":' + b"[" * 80 + b"]" * 80 + b',"a":1},',
        b'"x":"\\ud800",',
        b'"id":"\\ud800",',
        b'"\\ud800":1,',
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"[" * 70,
        b"]" * 70,
        b'{"a":',
        b"}",
        b'"',
        b"\\",
        b"\0",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b" ",
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A command, usually a good one, after some accidents."""
    data = json.dumps(draw(COMMANDS), ensure_ascii=draw(st.booleans()))
    # ensure_ascii False leaves lone surrogates, which no UTF-8 has.
    raw = data.encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(["flip", "cut", "insert", "member", "double"])):
            case "flip":
                raw = raw[:where] + bytes([draw(st.integers(0, 255))]) + raw[where + 1 :]
            case "cut":
                raw = raw[:where] + raw[where + draw(st.integers(0, 10)) :]
            case "insert":
                raw = raw[:where] + draw(PIECES) + raw[where:]
            case "member":
                raw = raw[:1] + draw(PIECES) + raw[1:]
            case "double":
                raw = raw[:where] + raw[where // 2 :]
    return raw


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_command_or_refused(data: bytes) -> None:
    check(data)


@settings(max_examples=600)
@given(mutated())
def test_any_mutation_of_a_command_is_a_command_or_refused(data: bytes) -> None:
    check(data)


@settings(max_examples=200)
@given(
    JSON,
    st.sampled_from([(",", ":"), (" , ", " : "), (",\n", ":\t")]),
    st.booleans(),
    st.sampled_from([b"", b',"x":{"body":2}', b',"key":"k"']),
)
def test_any_body_comes_out_byte_for_byte(
    value: object, separators: tuple[str, str], ascii_only: bool, around: bytes
) -> None:
    raw = json.dumps(value, separators=separators, ensure_ascii=ascii_only).encode()

    command = parse_command(send_of(raw, before=around, after=b" "))

    assert body_of(command) == raw
    assert command.reply_to == 1


@st.composite
def towers(draw: st.DrawFn) -> bytes:
    """JSON around the permitted depth, with brackets in strings and doubled members."""
    raw = b"1"
    for _ in range(draw(st.integers(60, 68))):
        raw = draw(
            st.sampled_from(
                [b"[%b]", b'{"a":%b}', b'["]\\"]",%b]', b'{"a":%b,"a":0}', b'[{"}":[]},%b,[]]']
            )
        ) % (raw,)
    return raw


@settings(max_examples=100)
@given(towers())
def test_depth_is_judged_by_the_bytes(raw: bytes) -> None:
    if levels_of(raw) <= BODY_DEPTH:
        assert body_of(parse_command(send_of(raw))) == raw
    else:
        assert invalid(send_of(raw)).path == "$.body"


# --- replies and events --------------------------------------------------------------------


def test_an_ack_answers_an_id() -> None:
    assert frames.ack(1, room="a") == b'{"type":"ack","id":1,"room":"a"}'
    assert json.loads(frames.ack("\u2028\0")) == {"type": "ack", "id": "\u2028\0"}


@pytest.mark.parametrize("code", ReplyCode)
def test_an_error_says_its_code_and_a_message(code: ReplyCode) -> None:
    assert json.loads(frames.error(code)) == {
        "type": "error",
        "code": code.value,
        "message": MESSAGES[code],
    }


def test_an_error_may_answer_an_id_name_a_path_and_tell_when_to_retry() -> None:
    error = json.loads(frames.error(ReplyCode.INVALID, id="x", path="$.a", retry_after=0))

    assert error == {
        "type": "error",
        "id": "x",
        "code": "invalid",
        "message": MESSAGES[ReplyCode.INVALID],
        "path": "$.a",
        "retry_after": 0,
    }


def test_a_bye_tells_whether_to_come_back_and_when() -> None:
    draining = json.loads(frames.bye(errors.DRAINING, after=1500))
    expired = json.loads(frames.bye(errors.TOKEN_EXPIRED))

    assert draining == {
        "type": "bye",
        "code": 1012,
        "reason": "draining",
        "reconnect": True,
        "after": 1500,
    }
    assert expired == {
        "type": "bye",
        "code": 4401,
        "reason": "token_expired",
        "reconnect": True,
    }


def test_a_final_bye_gives_no_time_to_come_back() -> None:
    assert json.loads(frames.bye(errors.SESSION_REVOKED, after=1500)) == {
        "type": "bye",
        "code": 4503,
        "reason": "session_revoked",
        "reconnect": False,
    }


def test_events_have_the_fields_of_the_protocol() -> None:
    assert json.loads(frames.left("a", "forbidden")) == {
        "type": "left",
        "room": "a",
        "reason": "forbidden",
    }
    assert json.loads(frames.epoch("a", "e2")) == {"type": "epoch", "room": "a", "epoch": "e2"}
    assert json.loads(frames.reset("a", "e2", 7)) == {
        "type": "reset",
        "room": "a",
        "epoch": "e2",
        "offset": 7,
    }
    assert json.loads(frames.skip("a", 7)) == {"type": "skip", "room": "a", "offset": 7}
    assert json.loads(frames.expiring(9000)) == {"type": "expiring", "expires_at": 9000}
    assert json.loads(frames.expiring(9000, now=True)) == {
        "type": "expiring",
        "expires_at": 9000,
        "now": True,
    }


def test_a_message_is_whole_once_its_place_is_put_in() -> None:
    head, tail = message_parts("a:b", 'al"ice', Raw(b'{ "x": 1 }'), "k\n")

    assert json.loads(head + b'12,"ts":1760000001234' + tail) == {
        "type": "message",
        "room": "a:b",
        "offset": 12,
        "ts": 1760000001234,
        "user": 'al"ice',
        "key": "k\n",
        "body": {"x": 1},
    }


def test_a_message_without_a_key_has_no_key() -> None:
    head, tail = message_parts("a", "alice", Raw(b"null"), None)

    assert head + b'1,"ts":2' + tail == (
        b'{"type":"message","room":"a","offset":1,"ts":2,"user":"alice","body":null}'
    )
