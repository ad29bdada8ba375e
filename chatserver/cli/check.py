"""``check``: what is wrong with the configuration and the store, before the server finds out."""

from __future__ import annotations

import asyncio
import re

import click

from chatserver import supervisor
from chatserver.cli.complaints import complain
from chatserver.cli.server import ask
from chatserver.core.errors import StoreUnavailable
from chatserver.settings import (
    ConfigurationError,
    Settings,
    development_secret,
    load,
    unknown_variables,
)
from chatserver.store.embedded import OLDEST, executable
from chatserver.supervisor import EXIT_OK


@click.command(
    epilog="""\b
Example:
  chatserver check && chatserver serve"""
)
@click.pass_context
def check(context: click.Context) -> None:
    """Say what is wrong with the configuration and the store, and what to do about it."""
    settings = load()
    for name in unknown_variables():
        complain(f"{name} is not a setting and is ignored; is it misspelt?")
    reasons = supervisor.refusals(settings)
    if settings.secret is None and (settings.data_dir / "secret").exists():
        development_secret(settings.data_dir)
    if reasons:
        raise ConfigurationError(reasons)
    click.echo(f"The configuration is good for {settings.environment}.")
    context.exit(asyncio.run(_check_store(settings)))


async def _check_store(settings: Settings) -> int:
    try:
        found = await ask(settings, lambda store: store.describe())
    except StoreUnavailable:
        if settings.redis_url is not None:
            raise
        click.echo(f"The private store is not running; serve will start {executable()}.")
        return EXIT_OK
    wrong = _store_problems(found["version"], found["policy"])
    if found["mode"] != found["wanted"]:
        wrong.append(
            "The store is one node of a cluster: name it in CHATSERVER_REDIS_URL as "
            "redis+cluster://host1:6379,host2:6379."
        )
    if wrong:
        raise ConfigurationError(wrong)
    about = f"version {found['version']}, {found['policy']}, {found['place']}"
    click.echo(f"The store answers: {about}.")
    if found["file"] == "0":
        complain(
            "The store writes no append-only file: what it has acknowledged since its snapshot "
            "is gone when its process ends, revocations too. Set appendonly to yes (CONFIG SET "
            "appendonly yes, and in its configuration)."
        )
    return EXIT_OK


def _store_problems(version: str, policy: str) -> list[str]:
    problems = []
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < OLDEST:
        problems.append(f"The store is of version {version}: it must be 7.0 or later.")
    if policy != "noeviction":
        problems.append(
            f"THE STORE MAY FORGET REVOCATIONS AND MESSAGES: its maxmemory-policy is {policy}. Set "
            "it to noeviction (CONFIG SET maxmemory-policy noeviction, and in its configuration)."
        )
    return problems
