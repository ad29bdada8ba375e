"""Settings: read once, checked whole, and silent about secrets."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from chatserver.settings import (
    ConfigurationError,
    describe,
    development_secret,
    environ,
    load,
    unknown_variables,
    variable,
)

ROOT = Path(__file__).parents[1]
SECRET = "tomato-4f1c9a7be2d05836-9c8e3b71f0a26d54"

SetVariables = Callable[..., None]


@pytest.fixture(autouse=True)
def set_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SetVariables:
    """An environment and a directory with nothing of ours; sets variables by field name."""
    for name in os.environ:
        if name.upper().startswith("CHATSERVER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def setter(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(variable(name), value)

    return setter


def reasons(**overrides: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as error:
        load(**overrides)
    return error.value.reasons


def test_with_nothing_set_it_is_a_development_server_on_this_machine() -> None:
    settings = load()

    assert (settings.environment, settings.host, settings.port) == (
        "development",
        "127.0.0.1",
        8000,
    )
    assert (settings.workers, settings.secret, settings.redis_url) == (1, None, None)
    assert (settings.issuer, settings.audience) == ("chatserver", "chatserver")
    assert (settings.frame_bytes, settings.rooms, settings.token_bytes) == (65536, 256, 4096)
    assert (settings.send_rate, settings.send_burst) == (10.0, 20)
    assert settings.problems() == []


def test_variables_come_before_the_file_and_options_before_both(
    set_variables: SetVariables,
) -> None:
    Path(".env").write_text(
        "CHATSERVER_PORT=1\nCHATSERVER_WORKERS=2\nCHATSERVER_ROOMS=3\nOTHER=x\n"
    )
    set_variables(port="4", workers="5")

    settings = load(port=6)

    assert (settings.port, settings.workers, settings.rooms) == (6, 5, 3)


def test_an_option_that_was_not_given_changes_nothing(set_variables: SetVariables) -> None:
    set_variables(port="4")

    assert load(port=None).port == 4


def test_an_empty_variable_is_not_set(set_variables: SetVariables) -> None:
    without = load()
    set_variables(port="", secret="", redis_url="", allowed_origins="", connections="")

    assert load() == without


def test_a_file_that_cannot_be_read_is_named() -> None:
    Path(".env").write_bytes(b"CHATSERVER_ISSUER=\xff\n")

    assert reasons() == [".env cannot be read: it must be a readable file of UTF-8 text."]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load().port = 1


def test_the_data_directory_follows_xdg_and_is_absolute(
    set_variables: SetVariables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert load().data_dir == tmp_path / ".local" / "share" / "chatserver"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # The specification says to ignore it.
    assert load().data_dir == tmp_path / ".local" / "share" / "chatserver"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert load().data_dir == Path("/data/chatserver")
    set_variables(data_dir="~/here")
    assert load().data_dir == tmp_path / "here"
    set_variables(data_dir="there")
    assert load().data_dir == tmp_path / "there"


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("https://chat.example", ("https://chat.example",)),
        (
            " HTTPS://Chat.Example:8443 ,http://localhost:3000,",
            ("https://chat.example:8443", "http://localhost:3000"),
        ),
        (
            "https://chat.example:443,http://chat.example:80",
            ("https://chat.example", "http://chat.example"),
        ),
        ("http://[::1]:5173", ("http://[::1]:5173",)),
        ("capacitor://localhost", ("capacitor://localhost",)),
    ],
)
def test_origins_are_compared_as_a_browser_writes_them(
    set_variables: SetVariables, text: str, origins: tuple[str, ...]
) -> None:
    set_variables(allowed_origins=text)

    assert load().allowed_origins == origins


@pytest.mark.parametrize(
    "text",
    [
        "*",
        "null",
        "chat.example",
        "https://",
        "https://*.example",
        "https://chat.example/",
        "https://chat.example/chat",
        "https://chat.example?x",
        "https://user@chat.example",
        "https://chat.example:0",
        "https://chat.example:65536",
        "https://chat.example:443:443",
        "https://chät.example",
        "https://chat.example https://other.example",
        "https://chat.example.",
        "https://good.example,*",
    ],
)
def test_what_is_not_exactly_an_origin_is_refused(set_variables: SetVariables, text: str) -> None:
    set_variables(allowed_origins=text)

    (reason,) = reasons()

    assert reason.startswith("CHATSERVER_ALLOWED_ORIGINS: every origin must be exactly")


def test_proxies_are_addresses_or_networks(set_variables: SetVariables) -> None:
    set_variables(trusted_proxies="10.0.0.0/8, 192.0.2.1,::1,2001:db8::/32")

    networks = ("10.0.0.0/8", "192.0.2.1/32", "::1/128", "2001:db8::/32")
    assert load().trusted_proxies == tuple(map(ip_network, networks))


@pytest.mark.parametrize("text", ["proxy", "10.0.0.1/8", "1.2.3", "::1/129", "*"])
def test_what_is_no_network_is_refused(set_variables: SetVariables, text: str) -> None:
    set_variables(trusted_proxies=text)

    (reason,) = reasons()

    assert reason.startswith("CHATSERVER_TRUSTED_PROXIES: every proxy must be")


@pytest.mark.parametrize(
    ("field", "value", "wording"),
    [
        ("port", "http", "must be a whole number."),
        ("port", "65536", "must be at most 65,535."),
        ("port", "-1", "must be at least 0."),
        ("workers", "0", "must be at least 1."),
        ("workers", "2.5", "must be a whole number."),
        ("frame_bytes", "900001", "must be at most 900,000."),
        ("frame_bytes", "1" * 5000, "must be a whole number."),
        ("send_rate", "0", "must be more than 0."),
        ("send_rate", "nan", "must be a number."),
        ("send_rate", "inf", "must be a number."),
        ("send_rate", "fast", "must be a number."),
        ("environment", "staging", "must be 'development' or 'production'."),
        ("log_level", "loud", "must be 'debug', 'info', 'warning', 'error' or 'critical'."),
        ("issuer", "x" * 257, "must have at most 256 characters."),
        ("data_dir", "~nobody-of-that-name/x", "has a ~ that stands for nobody's home directory."),
    ],
)
def test_a_wrong_value_is_explained_by_its_variable(
    set_variables: SetVariables, field: str, value: str, wording: str
) -> None:
    set_variables(**{field: value})

    assert reasons() == [f"{variable(field)}: {wording}"]


def test_every_reason_is_given_at_once(set_variables: SetVariables) -> None:
    set_variables(port="x", workers="x")

    assert len(reasons()) == 2


def test_a_certificate_goes_with_its_key(set_variables: SetVariables) -> None:
    set_variables(tls_certfile="cert.pem")

    assert reasons() == ["CHATSERVER_TLS_CERTFILE and CHATSERVER_TLS_KEYFILE go together."]


@pytest.mark.parametrize(
    "url",
    [
        "http://tomato@store",
        "tomato",
        "redis://",
        "redis:///0",
        "unix://",
        "redis://:tomato@store:tomato",
        "redis://:tomato@store:99999",
        "redis://:tomato@[::1",
        "redis://:tomato@store\u2100",
    ],
)
def test_a_wrong_redis_url_is_refused_and_not_repeated(
    set_variables: SetVariables, url: str
) -> None:
    set_variables(redis_url=url)

    (reason,) = reasons()

    assert reason.startswith("CHATSERVER_REDIS_URL: must be a URL such as redis://")
    assert "tomato" not in reason


@pytest.mark.parametrize(
    "url", ["redis://store", "redis://:pw@store:6379/0", "rediss://u:p@s", "unix:///a%20b/socket"]
)
def test_the_kinds_of_redis_url(set_variables: SetVariables, url: str) -> None:
    set_variables(redis_url=url)

    found = load().redis_url

    assert found is not None
    assert found.get_secret_value() == url


def test_secrets_show_in_no_repr_and_no_error(set_variables: SetVariables) -> None:
    set_variables(secret=SECRET, secret_previous=SECRET, redis_url=f"redis://:{SECRET}@store")
    settings = load()
    set_variables(port="x", secret="tomato\udc80")

    shown = [repr(settings), str(settings), settings.model_dump_json(), *reasons()]

    assert "CHATSERVER_SECRET: must be UTF-8 text." in shown
    assert "tomato" not in "".join(shown)


def test_production_names_everything_that_is_missing() -> None:
    problems = load(environment="production").problems()

    assert len(problems) == 4
    for name in ("SECRET", "TLS_CERTFILE", "ALLOWED_ORIGINS", "REDIS_URL"):
        assert any(f"CHATSERVER_{name}" in problem for problem in problems)


@pytest.mark.parametrize(
    "tls",
    [{"tls_certfile": "cert.pem", "tls_keyfile": "key.pem"}, {"trusted_proxies": "10.0.0.1"}],
)
def test_production_is_content_with_a_secret_tls_origins_and_a_store(tls: dict[str, str]) -> None:
    settings = load(
        environment="production",
        secret=SECRET,
        allowed_origins="https://chat.example",
        redis_url="redis://store",
        **tls,
    )

    assert settings.production
    assert settings.problems() == []


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)


@given(
    secret=TEXT,
    issuer=TEXT,
    send_rate=st.floats(1e-9, 1e6),
    proxies=st.lists(st.ip_addresses().map(str), max_size=3),
    origins=st.lists(st.from_regex(r"[a-z]+://[a-z0-9]+(:[1-9][0-9]{0,3})?", fullmatch=True)),
)
def test_a_child_reads_back_what_its_parent_was_told(
    secret: str, issuer: str, send_rate: float, proxies: list[str], origins: list[str]
) -> None:
    settings = load(
        secret=secret,
        issuer=issuer,
        send_rate=send_rate,
        trusted_proxies=proxies,
        allowed_origins=origins,
        redis_url=f"unix:///{issuer.strip('?#/')}x",
        tls_certfile="a",
        tls_keyfile="b",
    )

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ(settings).items():
            patch.setenv(name, value)

        assert load(env_file=None) == settings


def test_a_child_gets_our_environment_and_no_variable_of_ours_from_it(
    set_variables: SetVariables, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(redis_url="redis://store")
    monkeypatch.setenv("OTHER", "x")
    set_variables(secret=SECRET, secretly="misspelt", command="scripts/chatserver")

    child = environ(settings)

    assert child["OTHER"] == "x"
    assert child["CHATSERVER_REDIS_URL"] == "redis://store"
    assert child["CHATSERVER_COMMAND"] == "scripts/chatserver"
    assert "CHATSERVER_SECRET" not in child
    assert "CHATSERVER_SECRETLY" not in child


def test_a_misspelt_variable_is_found(set_variables: SetVariables) -> None:
    set_variables(secret=SECRET, secrte="x", command="x")

    assert unknown_variables() == ["CHATSERVER_SECRTE"]


class TestDevelopmentSecret:
    def test_it_is_made_once_and_private(self, tmp_path: Path) -> None:
        data_dir = tmp_path / "new" / "data"

        first = development_secret(data_dir)

        assert development_secret(data_dir) == first
        assert len(first) >= 32
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((data_dir / "secret").stat().st_mode) == 0o600
        assert [path.name for path in data_dir.iterdir()] == ["secret"]

    def test_processes_that_start_together_get_the_same_one(self, tmp_path: Path) -> None:
        script = (
            "import sys; from pathlib import Path; from chatserver.settings import *;"
            "sys.stdin.read(); print(development_secret(Path(sys.argv[1])).decode())"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path / "data")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            for _ in range(4)
        ]
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
            child.stdin = None

        answers = {child.communicate()[0] for child in children}

        assert len(answers) == 1
        assert len(answers.pop().strip()) >= 32

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
    def test_one_that_others_can_reach_is_refused(self, tmp_path: Path, mode: int) -> None:
        development_secret(tmp_path)
        (tmp_path / "secret").chmod(mode)

        with pytest.raises(ConfigurationError, match="can be read by others") as error:
            development_secret(tmp_path)

        assert (tmp_path / "secret").read_text() not in str(error.value)

    def test_one_that_is_damaged_is_refused(self, tmp_path: Path) -> None:
        development_secret(tmp_path)
        (tmp_path / "secret").write_text("short")

        with pytest.raises(ConfigurationError, match="is damaged"):
            development_secret(tmp_path)

    def test_a_directory_that_cannot_be_made_is_explained(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        with pytest.raises(ConfigurationError, match="CHATSERVER_DATA_DIR"):
            development_secret(tmp_path / "file" / "below")


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()

    for name, default, meaning in describe():
        shown = f"`{default.removesuffix('.0')}`" if default else ""
        assert f"| `{name}` | {shown} | {meaning} |" in page


def test_the_secret_type_is_one_that_hides() -> None:
    assert repr(load(secret=SECRET).secret) == repr(SecretStr(SECRET))
