"""A cluster: every command goes to the node that has its key, every channel is heard there.

A lane to a cluster is a lane to each node. What keeps a sender's order is the *slot*: all keys of
a room are in one, and its commands are under way to one node at a time. When a node says that a
slot has moved, its commands were not carried out; they wait, with all that come after them, until
the last one that is under way has been answered, and then go on in their order to where the slot
is now. So nothing overtakes, whenever the map of slots is corrected::

     under way to A ──▶ c1 ok, c2 MOVED, c3 MOVED         c2, c3, c4, c5 ──▶ under way to B
     come meanwhile     c4, c5 wait                       (none is left at A)

Nothing else is ever sent twice. A node that is away refuses its own slots and no others.

A subscription is one to each node that has channels of it. Channels are sharded: a slot's are heard
on its node. A node whose slot is taken away says so, and the channel is confirmed anew at the next
one, which tells its owner that something may have been missed.
"""

from __future__ import annotations

import asyncio
from binascii import crc_hqx
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from chatserver.core.errors import StoreRefused, StoreUnavailable
from chatserver.metrics import OTHER
from chatserver.settings import StorePlace, store_place
from chatserver.store import keys
from chatserver.store.link import (
    ANNOUNCE,
    LANE_COMMANDS,
    Done,
    Lane,
    Redirected,
    Reply,
    Store,
    Subscription,
)
from chatserver.store.topology import HURRY_SECONDS, SLOTS, Address, Argument, Cluster, Node

SHARDED = "SPUBLISH"
HOPS = 3
"""A command that was redirected more often is unavailable: the nodes disagree."""
UNUSED_SECONDS = 10.0
"""A lane to a node without slots is kept so long: slots may be on their way to it."""

_KEYLESS = frozenset(("PING", "ECHO", "TIME", "INFO"))
"""They go where the sessions are: the time is compared with times that scripts wrote there."""


def store_at(url: str) -> Store:
    """The store that a URL names: lanes and subscriptions are used alike on all of them."""
    place = store_place(url)
    return ClusterStore(place) if place.kind == "cluster" else Store(url)


def slot_of(key: Argument) -> int:
    """Its hash tag's, if it has one."""
    raw = key if isinstance(key, bytes) else str(key).encode()
    start = raw.find(b"{")
    if start >= 0:
        end = raw.find(b"}", start + 1)
        if end > start + 1:
            raw = raw[start + 1 : end]
    return crc_hqx(raw, 0) % SLOTS


def _key_of(command: list[Argument]) -> Argument:
    match command[0]:
        case "EVALSHA":
            return command[3]
        case str() as name if name in _KEYLESS:
            return keys.CHANNEL
        case _:
            return command[1]


# --- commands ------------------------------------------------------------------------------


class _Sent:
    """A command on its way through the cluster."""

    __slots__ = ("asked", "command", "done", "hops", "key", "node", "number", "wanted", "weight")

    def __init__(
        self,
        number: int,
        command: list[Argument],
        done: Done,
        wanted: Callable[[], bool] | None,
        weight: int,
    ) -> None:
        self.number = number
        """In the order of their submission."""
        self.command = command
        self.key = _key_of(command)
        self.done = done
        self.wanted = wanted
        self.weight = weight
        self.hops = 0
        self.asked: Address | None = None
        """Where it was told to ask, this once."""
        self.node: Address | None = None


class _Slot:
    """The commands of a slot that has any."""

    __slots__ = ("held", "node", "number", "turned", "under_way")

    def __init__(self, number: int) -> None:
        self.number = number
        self.node: Address | None = None
        """Where they go, while any is under way."""
        self.under_way = 0
        self.turned: list[_Sent] = []
        """Those that it turned away, in their order."""
        self.held: deque[_Sent] = deque()
        """Those that came after them."""


class ClusterLane(Lane):
    """To its callers a lane like any other; see the module's text."""

    def __init__(
        self, cluster: Cluster, *, batch: int, replicas: int = 0, name: str = OTHER
    ) -> None:
        self._cluster = cluster
        self._new_lane = partial(Lane, batch=batch, replicas=replicas, name=name)
        self._lanes: dict[Address, Lane] = {}
        self._used_at: dict[Address, float] = {}
        self._slots: dict[int, _Slot] = {}
        self._count = 0
        self._early: list[_Sent] = []
        """Before the map of slots was looked at."""
        self._running: asyncio.TaskGroup | None = None
        self._tasks: dict[Address, asyncio.Task[None]] = {}
        self._ended = False
        cluster.tell(self._look_again)

    @property
    def down(self) -> bool:
        return all(lane.down for lane in self._lanes.values())

    def submit(
        self,
        command: list[Argument],
        done: Done,
        wanted: Callable[[], bool] | None = None,
        weight: int = 1,
    ) -> None:
        if command[0] == "SCAN":
            self._scan(command, done)
            return
        # The first word, or an argument of a script that announces.
        command = [SHARDED if word is ANNOUNCE else word for word in command]
        self._count += 1
        sent = _Sent(self._count, command, done, wanted, weight)
        if not self._cluster.looked and len(self._early) < LANE_COMMANDS:
            self._early.append(sent)
        else:
            self._submit(sent)

    async def run(self) -> None:
        """Carry out what is queued, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._running = tasks
            try:
                self._look_again()
                for address, lane in self._lanes.items():
                    self._start(address, lane)
                await asyncio.Event().wait()
            finally:
                self._ended = True
                early, self._early = self._early, []
                self._refuse(early, "the server is stopping")

    def node(self, address: Address) -> Lane:
        """The lane to a node, for what is asked of that one."""
        lane = self._lanes.get(address)
        if lane is None:
            lane = self._lanes[address] = self._new_lane(self._cluster.place(address))
            self._start(address, lane)
        return lane

    def _start(self, address: Address, lane: Lane) -> None:
        if self._running is not None and not self._ended and address not in self._tasks:
            self._tasks[address] = self._running.create_task(lane.run())

    def _look_again(self) -> None:
        """The map may have changed."""
        if not self._cluster.looked or self._ended:
            return
        # Connected before they are needed: there may be no descriptor left by then.
        there = self._cluster.primaries()
        now = asyncio.get_running_loop().time()
        for address in there:
            self.node(address)
            self._used_at[address] = now
        for address in self._lanes.keys() - set(there):
            if now - self._used_at.get(address, 0.0) > UNUSED_SECONDS:
                del self._lanes[address]
                if address in self._tasks:
                    self._tasks.pop(address).cancel()
        early, self._early = self._early, []
        for sent in early:
            self._submit(sent)

    # One slot's commands.

    def _submit(self, sent: _Sent) -> None:
        number = slot_of(sent.key)
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = _Slot(number)
        if not slot.turned:
            self._send(slot, sent)
            self._forget(slot)
        elif len(slot.held) < LANE_COMMANDS:
            slot.held.append(sent)
        else:
            self._refuse([sent], "too much waits for its slot to move")

    def _send(self, slot: _Slot, sent: _Sent) -> None:
        # A lane that is down has nothing under way, even if it has yet to say so of all.
        lane = None if slot.node is None else self._lanes.get(slot.node)
        if not slot.under_way or lane is None or lane.down:
            slot.node = self._cluster.owner(slot.number)
        sent.node = sent.asked or slot.node
        if sent.node is None or self._ended:
            self._cluster.look()
            self._refuse([sent], self._cluster.why_not())
            return
        lane = self.node(sent.node)
        self._used_at[sent.node] = asyncio.get_running_loop().time()
        slot.under_way += 1
        if sent.asked is not None:
            # Without weight: in the same pipeline, for it counts for one command.
            lane.submit(["ASKING"], _ignore, weight=0)
        wanted = None if sent.wanted is None else partial(self._wanted, slot, sent.wanted)
        lane.submit(sent.command, partial(self._answered, slot, sent), wanted, sent.weight)

    def _wanted(self, slot: _Slot, wanted: Callable[[], bool]) -> bool:
        if wanted():
            return True
        slot.under_way -= 1
        self._go_on(slot)
        return False

    def _answered(self, slot: _Slot, sent: _Sent, reply: Reply | StoreUnavailable) -> None:
        slot.under_way -= 1
        try:
            if isinstance(reply, Redirected) and sent.hops < HOPS:
                self._turn(slot, sent, reply)
                return
            if isinstance(reply, StoreRefused) and str(reply).startswith("CLUSTERDOWN"):
                self._cluster.look()
            self._give_up_before(slot, sent)
            sent.done(reply)
        finally:
            self._go_on(slot)

    def _give_up_before(self, slot: _Slot, sent: _Sent) -> None:
        """What was turned away before this one was carried out: the slot has come back meanwhile,
        and to carry it out now would be out of its order."""
        overtaken = [
            each for each in slot.turned if each.key == sent.key and each.number < sent.number
        ]
        for each in overtaken:
            slot.turned.remove(each)
        self._refuse(overtaken, "its slot has moved to and fro")

    def _turn(self, slot: _Slot, sent: _Sent, to: Redirected) -> None:
        assert sent.node is not None
        address = to.found_by(sent.node)
        sent.hops += 1
        sent.asked = address if to.asking else None
        if not to.asking:
            self._cluster.moved(to.slot, address)
        slot.turned.append(sent)

    def _go_on(self, slot: _Slot) -> None:
        if slot.under_way:
            return
        waiting = [*slot.turned, *slot.held]
        slot.turned.clear()
        slot.held.clear()
        for sent in waiting:
            self._send(slot, sent)
        self._forget(slot)

    def _forget(self, slot: _Slot) -> None:
        if not slot.under_way and self._slots.get(slot.number) is slot:
            del self._slots[slot.number]

    def _refuse(self, refused: Iterable[_Sent], reason: str) -> None:
        for sent in refused:
            asyncio.get_running_loop().call_soon(sent.done, StoreUnavailable(reason))

    # All keys.

    def _scan(self, command: list[Argument], done: Done) -> None:
        """One node after the other. The cursor's lowest 14 bits are a slot of whose turn it is."""
        cursor, first = divmod(int(command[1]), SLOTS)
        owner = self._cluster.owner(first)
        if owner is None or self._ended:
            refusal = StoreUnavailable(self._cluster.why_not())
            asyncio.get_running_loop().call_soon(done, refusal)
            return

        def answered(reply: Reply | StoreUnavailable) -> None:
            if isinstance(reply, StoreUnavailable):
                done(reply)
                return
            cursor, found = reply
            after = int(cursor) * SLOTS + first if int(cursor) else self._cluster.next_first(first)
            done([b"%d" % after, found])

        self.node(owner).submit([command[0], cursor, *command[2:]], answered)


def _ignore(reply: Reply | StoreUnavailable) -> None:
    """What it was for is answered itself."""


# --- channels ------------------------------------------------------------------------------


class _NodeSubscription(Subscription):
    """One node's share. ``on_turned(channels)`` when it does not have them any more."""

    def __init__(
        self,
        place: Node,
        *,
        on_message: Callable[[str, bytes], None],
        on_confirmed: Callable[[str], None],
        on_turned: Callable[[list[str], Redirected | None], None],
    ) -> None:
        super().__init__(place, on_message=on_message, on_confirmed=on_confirmed)
        self._on_turned = on_turned

    def _commands(self, fresh: list[str], stale: list[str]) -> list[list[str]]:
        # One by one: several in a command would have to be of one slot.
        asked = [["SSUBSCRIBE", channel] for channel in fresh]
        return asked + [["SUNSUBSCRIBE", channel] for channel in stale]

    def _receive(self, reply: Reply) -> None:
        match reply:
            case [b"smessage", channel, payload]:
                super()._receive([b"message", channel, payload])
            case [b"ssubscribe", channel, count]:
                super()._receive([b"subscribe", channel, count])
            case [b"sunsubscribe", bytes() as raw, _]:
                channel = raw.decode(errors="replace")
                # Else it is the answer to ours, and another answer follows or is not wanted.
                if channel not in self._unsent and channel not in self._unconfirmed:
                    self._turn([channel])
            case Redirected():
                found = [name for name in self._channels if slot_of(name) == reply.slot]
                self._turn(found, reply)
            case StoreRefused():  # which of them is not said
                self._turn(list(self._unconfirmed))
            case _:
                super()._receive(reply)

    def _turn(self, channels: list[str], to: Redirected | None = None) -> None:
        wanted = [channel for channel in channels if channel in self._channels]
        for channel in channels:
            self._channels.discard(channel)
            self._unsent.pop(channel, None)
            self._unconfirmed.pop(channel, None)
        if wanted:
            self._on_turned(wanted, to)


class ClusterSubscription(Subscription):
    """To its callers a subscription like any other; see the module's text."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        on_message: Callable[[str, bytes], None],
        on_confirmed: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._on_message = on_message
        self._on_confirmed = on_confirmed
        self._homes: dict[str, Address | None] = {}
        """Each channel's node; None while it is looked for."""
        self._nodes: dict[Address, _NodeSubscription] = {}
        self._tasks: dict[Address, asyncio.Task[None]] = {}
        self._running: asyncio.TaskGroup | None = None
        self._unsettled = asyncio.Event()
        cluster.tell(self._unsettled.set)

    def subscribe(self, channel: str) -> None:
        self._homes.setdefault(channel, None)
        self._settle(channel, again=True)

    def unsubscribe(self, channel: str) -> None:
        home = self._homes.pop(channel, None)
        if home is not None:
            self._nodes[home].unsubscribe(channel)

    async def run(self) -> None:
        """Listen until cancelled, on whichever nodes have the channels."""
        async with asyncio.TaskGroup() as tasks:
            self._running = tasks
            for address, node in self._nodes.items():
                self._start(address, node)
            while True:
                await self._unsettled.wait()
                self._unsettled.clear()
                for channel in list(self._homes):
                    self._settle(channel)
                self._leave_idle()
                # Nodes that disagree send a channel to and fro.
                await asyncio.sleep(HURRY_SECONDS)

    def _settle(self, channel: str, *, again: bool = False) -> None:
        """See that it is heard on the node that has its slot now."""
        home, owner = self._homes[channel], self._cluster.owner(slot_of(channel))
        if owner is None:
            self._cluster.look()
            return
        if home == owner and not again:
            return
        if home is not None and home != owner:
            self._nodes[home].unsubscribe(channel)
        self._homes[channel] = owner
        self._node(owner).subscribe(channel)

    def _node(self, address: Address) -> _NodeSubscription:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = _NodeSubscription(
                self._cluster.place(address),
                on_message=self._on_message,
                on_confirmed=partial(self._confirmed, address),
                on_turned=partial(self._turned, address),
            )
            self._start(address, node)
        return node

    def _start(self, address: Address, node: _NodeSubscription) -> None:
        if self._running is not None and address not in self._tasks:
            self._tasks[address] = self._running.create_task(node.run())

    def _leave_idle(self) -> None:
        """Nodes without channels of ours: they may be gone."""
        homes = set(self._homes.values())
        for address in self._nodes.keys() - homes:
            del self._nodes[address]
            self._tasks.pop(address).cancel()

    def _confirmed(self, address: Address, channel: str) -> None:
        if self._homes.get(channel) == address:
            self._on_confirmed(channel)

    def _turned(self, address: Address, channels: list[str], to: Redirected | None) -> None:
        if to is not None and not to.asking:
            self._cluster.moved(to.slot, to.found_by(address))
        for channel in channels:
            if self._homes.get(channel) == address:
                self._homes[channel] = None
        self._unsettled.set()
        self._cluster.look()


# --- the whole -----------------------------------------------------------------------------


class ClusterStore(Store):
    """Several primaries that share the keys. ``run`` must be a task while it is used."""

    announce = SHARDED

    def __init__(self, place: StorePlace) -> None:
        self._cluster = Cluster(place)

    def lane(self, batch: int = 256, replicas: int = 0, name: str = OTHER) -> ClusterLane:
        return ClusterLane(self._cluster, batch=batch, replicas=replicas, name=name)

    def subscription(
        self,
        on_message: Callable[[str, bytes], None],
        on_confirmed: Callable[[str], None] = lambda channel: None,
    ) -> ClusterSubscription:
        return ClusterSubscription(self._cluster, on_message=on_message, on_confirmed=on_confirmed)

    async def run(self) -> None:
        await self._cluster.run()

    async def describe(self) -> dict[str, str]:
        """As of one server: the oldest version, and the policy and file of one that may forget."""
        assert isinstance(self._own, ClusterLane)
        nodes = [self._own.node(address) for address in self._cluster.primaries()]
        found = await asyncio.gather(*(self._about(node.call) for node in nodes))
        found.sort(key=lambda about: [int(n) for n in about["version"].split(".") if n.isdigit()])
        policies = [about["policy"] for about in found]
        policy = next((each for each in policies if each != "noeviction"), "noeviction")
        file = min(about["file"] for about in found)
        whole = {"policy": policy, "file": file, "wanted": "cluster", "place": str(self._cluster)}
        return found[0] | whole
