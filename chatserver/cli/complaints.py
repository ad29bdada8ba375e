"""How errors and advice are told: on standard error, one sentence a line, without secrets."""

from __future__ import annotations

import click

from chatserver import telemetry


def complain(*sentences: str) -> None:
    for sentence in sentences:
        click.echo(f"chatserver: {telemetry.redact(sentence)}", err=True)
