"""The Python client under scripts/conformance: docs/client-authors.md tells what it has to do."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from typing import Any

from chatserver.client import ChatError, Client, Gap, Left, Message, TokenKeeper, TokenPair, connect

URL, PAIR = sys.argv[1], TokenPair(**json.loads(sys.argv[2]))


async def save(pair: TokenPair) -> None:
    saved = URL.replace("ws://", "http://").replace("/v1/ws", "/saved")
    headers = {"Authorization": f"Bearer {pair.refresh_token}"}
    request = urllib.request.Request(saved, headers=headers, method="POST")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    await asyncio.to_thread(direct.open, request)


async def send(client: Client, text: str) -> None:
    try:
        await client.send("general", {"text": text})
    except ChatError:
        await client.send("general", {"saw": "failed", "text": text})


async def follow(client: Client, tasks: asyncio.TaskGroup, name: str) -> None:
    async for event in await client.join(name):
        match event:
            case Gap(first=first, last=last):
                told: Any = client.send("general", {"saw": "gap", "first": first, "last": last})
            case Left(reason=reason):
                told = client.send("general", {"saw": "left", "reason": reason})
            case Message(body={"do": "send", "text": text}):
                told = send(client, text)
            case Message(body={"do": "join", "room": room}):
                told = follow(client, tasks, room)
            case Message(body={"do": "leave"}):
                told = client.leave(name)
            case Message(body={"do": "logout"}):
                told = client.logout()
            case _:
                continue
        tasks.create_task(told)


async def main() -> None:
    token = TokenKeeper(URL, PAIR, save=save)
    async with connect(URL, token=token) as client, asyncio.TaskGroup() as tasks:
        await follow(client, tasks, "general")
        await asyncio.Event().wait()  # A room that was left is not the end.


asyncio.run(main())
