from __future__ import annotations

from itertools import permutations

import pytest

from chatserver.core.claims import CLOCK_SKEW, MAX_LIFETIME, Identity, identify
from chatserver.core.errors import ReplyCode, TokenRefused

NOW = 1_700_000_000
HEADER: dict[str, object] = {"alg": "HS256", "typ": "at+jwt", "kid": "a-kid"}
CLAIMS: dict[str, object] = {
    "iss": "us",
    "aud": "our-clients",
    "sub": "alice",
    "sid": "session-1",
    "jti": "token-1",
    "iat": NOW,
    "exp": NOW + 900,
    "roles": ["member", "guest"],
}


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def changed(base: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in {**base, **changes}.items() if value is not ABSENT}


def identify_claims(changes: dict[str, object] | None = None, *, now: float = NOW) -> Identity:
    claims = changed(CLAIMS, changes or {})
    return identify(HEADER, claims, now=now, issuer="us", audience="our-clients")


def refusal(changes: dict[str, object], *, now: float = NOW) -> ReplyCode:
    with pytest.raises(TokenRefused) as refused:
        identify_claims(changes, now=now)
    return refused.value.code


def test_good_claims_become_an_identity() -> None:
    identity = identify_claims({"rooms": {"lobby": "rw", "team:*": "rwm"}})

    assert identity == Identity(
        user="alice",
        session="session-1",
        token_id="token-1",
        roles=("member", "guest"),
        rooms={"lobby": "rw", "team:*": "rwm"},
        issued_at=NOW,
        expires_at=NOW + 900,
    )


def test_an_absent_rooms_claim_is_told_from_an_empty_one() -> None:
    assert identify_claims().rooms is None
    assert identify_claims({"rooms": {}}).rooms == {}


def test_claims_nobody_knows_are_ignored() -> None:
    assert identify_claims({"scope": ["x"], "at_hash": 1}) == identify_claims()


def test_later_changes_of_the_claims_do_not_reach_the_identity() -> None:
    rooms = {"lobby": "r"}
    roles = ["guest"]
    identity = identify_claims({"rooms": rooms, "roles": roles})

    rooms["lobby"] = "rwm"
    roles.append("admin")

    assert identity.rooms == {"lobby": "r"}
    assert identity.roles == ("guest",)


def test_a_refusal_names_the_fault_to_the_caller_alone() -> None:
    with pytest.raises(TokenRefused) as refused:
        identify_claims({"sid": ""})

    assert str(refused.value) == "token_invalid"
    assert isinstance(refused.value.__cause__, ValueError)
    assert "sid" in str(refused.value.__cause__)


@pytest.mark.parametrize(
    "changes",
    [
        *({"alg": alg} for alg in ("none", "HS", "hs256", "HS384", "RS256", "", None)),
        *({"alg": alg} for alg in (["HS256"], {"HS256": 1}, 256, True, ABSENT)),
        *({"typ": typ} for typ in ("JWT", "jwt", "AT+JWT", "application/at+jwt", "rt+jwt")),
        *({"typ": typ} for typ in ("", None, ["at+jwt"], 1, ABSENT)),
        *({"kid": kid} for kid in (None, 1, ["a-kid"], {"a": 1}, ABSENT)),
        {"crit": ["exp"]},
        {"b64": False},
        {"jku": "https://keys.example/"},
        {"x5u": "https://keys.example/"},
        {"zip": "DEF"},
        {"alg": ABSENT, "jwk": {}},
    ],
    ids=repr,
)
def test_a_header_with_anything_else_is_invalid(changes: dict[str, object]) -> None:
    with pytest.raises(TokenRefused) as refused:
        identify(changed(HEADER, changes), CLAIMS, now=NOW, issuer="us", audience="our-clients")

    assert refused.value.code is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_missing_claim_is_invalid(claim: str) -> None:
    assert refusal({claim: ABSENT}) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize("claim", [*CLAIMS, "nbf", "rooms"])
def test_null_is_invalid_in_every_claim(claim: str) -> None:
    assert refusal({claim: None}) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize("value", ["", "them", "us ", "US", ["us"], 1, {}], ids=repr)
def test_another_issuer_is_invalid(value: object) -> None:
    assert refusal({"iss": value}) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize(
    "value", ["", "others", ["our-clients"], ["others", "our-clients"], 1, {}], ids=repr
)
def test_another_audience_or_a_list_of_them_is_invalid(value: object) -> None:
    assert refusal({"aud": value}) is ReplyCode.TOKEN_INVALID


BAD_TEXT: list[object] = [
    "a\0b",
    "a\n",
    "\x1f",
    "\x7f",
    "\x80",
    "\x9f",
    "\ud800",
    "a\udfffb",
    1,
    True,
    1.5,
    b"alice",
    ["alice"],
    {"alice": 1},
]


@pytest.mark.parametrize("claim", ["sub", "sid", "jti"])
@pytest.mark.parametrize("value", ["", "a" * 129, *BAD_TEXT], ids=repr)
def test_a_malformed_id_is_invalid(claim: str, value: object) -> None:
    assert refusal({claim: value}) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize("value", ["a", "a" * 128, "𝒜" * 128, "Ж é\u00a0\u2028", "../*"], ids=repr)
def test_ids_are_up_to_128_characters_of_any_script(value: str) -> None:
    identity = identify_claims({"sub": value, "sid": value, "jti": value})

    assert (identity.user, identity.session, identity.token_id) == (value, value, value)


@pytest.mark.parametrize("claim", ["iat", "exp", "nbf"])
@pytest.mark.parametrize(
    "value",
    [
        str(NOW + 1),
        float(NOW + 1),
        True,
        False,
        [NOW + 1],
        {"s": NOW + 1},
        float("nan"),
        float("inf"),
        -1,
        2**53 + 1,
        10**5000,
        -(10**5000),
    ],
    # Python refuses to print the largest.
    ids=lambda value: (
        f"{type(value).__name__}-{str(value)[:12]}"
        if not isinstance(value, int) or abs(value) < 2**64
        else "huge"
    ),
)
def test_a_time_that_is_no_whole_number_in_range_is_invalid(claim: str, value: object) -> None:
    assert refusal({claim: value}) is ReplyCode.TOKEN_INVALID


def test_times_reach_from_zero_to_two_to_the_53rd() -> None:
    assert identify_claims({"iat": 0, "nbf": 0, "exp": 1}, now=0).issued_at == 0
    assert identify_claims({"iat": 2**53 - 1, "exp": 2**53}, now=2**53 - 1).expires_at == 2**53


@pytest.mark.parametrize("lifetime", [-1, 0, MAX_LIFETIME + 1, 10**9])
def test_a_lifetime_outside_of_its_bounds_is_invalid(lifetime: int) -> None:
    assert refusal({"exp": NOW + lifetime}) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize("lifetime", [1, MAX_LIFETIME])
def test_a_lifetime_may_be_one_second_to_15_minutes(lifetime: int) -> None:
    assert identify_claims({"exp": NOW + lifetime}).expires_at == NOW + lifetime


def test_iat_and_nbf_may_lie_5_seconds_ahead() -> None:
    assert identify_claims(now=NOW - CLOCK_SKEW).issued_at == NOW
    assert identify_claims({"nbf": NOW + CLOCK_SKEW}).issued_at == NOW


def test_iat_and_nbf_further_ahead_are_invalid() -> None:
    assert refusal({}, now=NOW - CLOCK_SKEW - 0.001) is ReplyCode.TOKEN_INVALID
    assert refusal({"nbf": NOW}, now=NOW - CLOCK_SKEW - 0.001) is ReplyCode.TOKEN_INVALID
    assert refusal({"nbf": 0}, now=NOW - CLOCK_SKEW - 0.001) is ReplyCode.TOKEN_INVALID
    assert refusal({"nbf": NOW + CLOCK_SKEW + 1}) is ReplyCode.TOKEN_INVALID


def test_a_token_is_good_until_just_before_exp_and_expired_from_exp_on() -> None:
    assert identify_claims(now=NOW + 899.999).expires_at == NOW + 900
    assert refusal({}, now=NOW + 900) is ReplyCode.TOKEN_EXPIRED
    assert refusal({}, now=NOW + 10**9) is ReplyCode.TOKEN_EXPIRED


@pytest.mark.parametrize(
    "changes", [{"aud": "others"}, {"roles": "admin"}, {"rooms": []}, {"jti": ""}], ids=repr
)
def test_an_expired_token_with_another_fault_is_invalid(changes: dict[str, object]) -> None:
    assert refusal(changes, now=NOW + 900) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize(
    "value",
    [
        "admin",
        {"admin": True},
        ("admin",),
        7,
        ["member"] * 33,
        ["member"] * 1000,
        ["member", 7],
        [["member"]],
        [None],
        [""],
        ["a" * 65],
        *([text] for text in BAD_TEXT),
    ],
    ids=repr,
)
def test_malformed_roles_are_invalid(value: object) -> None:
    assert refusal({"roles": value}) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize("value", [[], ["a" * 64] * 32], ids=["none", "most"])
def test_roles_are_up_to_32_strings_of_up_to_64_characters(value: list[str]) -> None:
    assert identify_claims({"roles": value}).roles == tuple(value)


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["lobby"],
        "lobby",
        "*",
        7,
        {f"room{n}": "r" for n in range(257)},
        {7: "r"},
        *(
            {pattern: "r"}
            for pattern in (
                "",
                "a" * 129,
                "a" * 129 + "*",
                "a b",
                "a\n",
                "*\n",
                "é",
                "a/b",
                "{a}",
                ".a",
                "_a*",
                ":*",
                "**",
                "a**",
                "*a",
                "a*b",
                "a?",
            )
        ),
        *({"lobby": rights} for rights in ("x", "R", "rr", "rwr", "rwmr", "r ", "r\n")),
        *({"lobby": rights} for rights in BAD_TEXT),
        {"lobby": None},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_malformed_rooms_are_invalid(value: object) -> None:
    assert refusal({"rooms": value}) is ReplyCode.TOKEN_INVALID


@pytest.mark.parametrize(
    "pattern", ["a", "9", "a" * 128, "a" * 128 + "*", "*", "a*", "dm:a@b:c+d_e-f.g", "team:*"]
)
def test_a_room_pattern_is_a_name_or_a_prefix_and_a_star(pattern: str) -> None:
    assert identify_claims({"rooms": {pattern: "r"}}).rooms == {pattern: "r"}


def test_rights_are_distinct_letters_in_any_order_or_none() -> None:
    all_rights = ["".join(some) for n in range(4) for some in permutations("rwm", n)]
    rooms = {f"room{n}": rights for n, rights in enumerate(all_rights)}

    assert len(all_rights) == 16
    assert identify_claims({"rooms": rooms}).rooms == rooms


def test_256_rooms_are_not_too_many() -> None:
    rooms = {f"room{n}": "rwm" for n in range(256)}

    assert identify_claims({"rooms": rooms}).rooms == rooms
