"""Refresh tokens: what is written is read, and nothing else is."""

from __future__ import annotations

import string
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable

import pytest

from chatserver.core.errors import ReplyCode, TokenRefused
from chatserver.store.keyring import key_id
from chatserver.store.refresh import Named, RefreshTokens

SECRET = b"a secret of these tests, 1: 6f1f80"
OTHER = b"a secret of these tests, 2: 0c93bb"
SALT = b"0123456789abcdef" * 4
OTHER_SALT = b"fedcba9876543210" * 4
KID = key_id(SECRET)
NAMED = Named(kid=KID, family="s-AbC_def-0123456789xyz0", generation=7)
ALPHABET = string.ascii_letters + string.digits + "-_"


def tokens() -> RefreshTokens:
    return RefreshTokens(SECRET)


def is_refused(text: str, salt: bytes = SALT, by: RefreshTokens | None = None) -> bool:
    try:
        (by or tokens()).read(text, salt)
    except TokenRefused as refused:
        return refused.code is ReplyCode.TOKEN_INVALID
    return False


@pytest.mark.parametrize("generation", [1, 2, 10, 9_999_999_999])
@pytest.mark.parametrize("family", ["s", "-", "s-AbC_def-0123456789xyz0", "x" * 64])
def test_what_is_written_is_read(family: str, generation: int) -> None:
    named = Named(kid=KID, family=family, generation=generation)
    text = tokens().write(named, SALT)

    assert tokens().read(text, SALT) == named
    assert text.startswith(f"rt1.{KID}.{family}.{generation}.")
    assert len(text.rpartition(".")[2]) == 43


def test_a_family_begins_with_generation_one_under_the_secret_that_writes() -> None:
    assert tokens().first("s1") == Named(kid=KID, family="s1", generation=1)


def test_the_same_is_written_the_same() -> None:
    assert tokens().write(NAMED, SALT) == tokens().write(NAMED, SALT)


def test_every_changed_character_is_refused() -> None:
    reader = tokens()
    text = reader.write(NAMED, SALT)
    for place, character in enumerate(text):
        for other in {"A", "B", "0", "1", ".", "-", chr(ord(character) ^ 1)} - {character}:
            assert is_refused(text[:place] + other + text[place + 1 :], by=reader), place


def test_every_missing_and_every_added_character_is_refused() -> None:
    reader = tokens()
    text = reader.write(NAMED, SALT)
    for place in range(len(text)):
        assert is_refused(text[:place] + text[place + 1 :], by=reader)
        assert is_refused(text[:place] + "A" + text[place:], by=reader)


def test_another_last_character_is_refused_though_it_decodes_to_the_same() -> None:
    reader = tokens()
    text = reader.write(NAMED, SALT)
    refused = [other for other in ALPHABET if is_refused(text[:-1] + other, by=reader)]

    assert len(refused) == 63
    assert text[-1] not in refused


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text + "=",
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.replace("rt1.", "RT1."),
        lambda text: text.replace("rt1.", "rt2."),
        lambda text: text.replace(".7.", ".07."),
        lambda text: text.replace(".7.", ".+7."),
        lambda text: text.replace(".7.", ".٧."),
        lambda text: text.replace(".7.", ".7.0."),
        lambda text: text.replace(".7.", ".0."),
        lambda text: text.replace(".7.", ".-7."),
        lambda text: text.replace("-", "+").replace("_", "/"),
        lambda text: text + "." + text,
        lambda text: text.swapcase(),
    ],
)
def test_a_token_has_one_spelling(respell: Callable[[str], str]) -> None:
    text = tokens().write(NAMED, SALT)

    assert is_refused(respell(text))
    assert not is_refused(text)


def test_another_salt_or_another_secret_reads_nothing() -> None:
    text = tokens().write(NAMED, SALT)

    assert is_refused(text, OTHER_SALT)
    assert is_refused(text, b"")
    assert is_refused(text, by=RefreshTokens(OTHER))
    assert is_refused(text.replace(KID, key_id(OTHER)), by=RefreshTokens(OTHER))
    assert is_refused(text.replace(KID, key_id(OTHER)), by=RefreshTokens(SECRET, OTHER))


def test_salts_may_alternate() -> None:
    both = tokens()
    texts = {salt: both.write(NAMED, salt) for salt in (SALT, OTHER_SALT)}

    for salt in (SALT, OTHER_SALT, SALT):
        assert both.read(texts[salt], salt) == NAMED
    assert texts[SALT] != texts[OTHER_SALT]


def test_a_family_of_the_previous_secret_goes_on_under_it() -> None:
    text = RefreshTokens(OTHER).write(NAMED._replace(kid=key_id(OTHER)), SALT)
    both = RefreshTokens(SECRET, OTHER)
    named = both.read(text, SALT)
    successor = both.write(named._replace(generation=8), SALT)

    assert named.kid == key_id(OTHER)
    assert both.first("new").kid == KID
    assert RefreshTokens(OTHER).read(successor, SALT).generation == 8
    assert is_refused(successor)


def test_a_token_id_is_the_same_when_made_again_and_another_for_each_generation() -> None:
    names = [NAMED._replace(generation=n) for n in range(1, 200)]
    names += [NAMED._replace(family="s2"), NAMED._replace(family="s2", generation=1)]
    ids = [tokens().token_id(named, SALT) for named in names]

    assert ids == [tokens().token_id(named, SALT) for named in names]
    assert len(set(ids)) == len(names)
    assert all(len(each) == 24 and each.startswith("t-") for each in ids)
    assert tokens().token_id(NAMED, OTHER_SALT) not in ids


def test_a_token_id_gives_nothing_of_the_seal_away() -> None:
    seal = tokens().write(NAMED, SALT).rpartition(".")[2]

    assert tokens().token_id(NAMED, SALT)[2:] not in seal


@pytest.mark.parametrize("secrets", [(SECRET,), (SECRET, OTHER)])
def test_a_repr_shows_no_secret(secrets: tuple[bytes, ...]) -> None:
    shown = repr(RefreshTokens(*secrets))

    assert shown == f"<RefreshTokens kid={KID}>"


ODD = {
    "empty": "",
    "dots": "." * 1_000_000,
    "a megabyte": "A" * 1_000_000,
    "a long family": f"rt1.{KID}." + "x" * 1_000_000 + ".1." + "A" * 43,
    "65 characters of family": f"rt1.{KID}." + "x" * 65 + ".1." + "A" * 43,
    "a long generation": f"rt1.{KID}.s." + "9" * 1_000_000 + "." + "A" * 43,
    "eleven digits": f"rt1.{KID}.s." + "9" * 11 + "." + "A" * 43,
    "a long seal": f"rt1.{KID}.s.1." + "A" * 1_000_000,
    "many prefixes": "rt1." * 250_000,
    "unicode": "rt1.é" + "𝒳" * 100_000,
    "unicode family": f"rt1.{KID}.sé.1." + "A" * 43,
    "lone surrogate": f"rt1.{KID}.\ud800.1." + "A" * 43,
    "NUL": f"rt1.{KID}.s\x00.1." + "A" * 43,
    "line feed": f"rt1.{KID}.s.1." + "A" * 43 + "\n",
    "unknown kid": "rt1." + "x" * 16 + ".s.1." + "A" * 43,
    "kid a path": "rt1.../../dev/null0..s.1." + "A" * 43,
    "a JWT": "eyJhbGciOiJIUzI1NiJ9.e30." + "A" * 43,
    "zero seal": f"rt1.{KID}.s.1." + urlsafe_b64encode(bytes(32)).decode().rstrip("="),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_and_huge_texts_are_refused_at_once(what: str) -> None:
    reader = tokens()
    reader.write(NAMED, SALT)
    began = time.thread_time()
    refused = is_refused(ODD[what], by=reader)
    took = time.thread_time() - began

    assert refused
    assert took < 0.05  # of a processor, and a slow one; 5 ms is the rule
