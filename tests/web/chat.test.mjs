// What the conformance suite cannot see from the wire: bounds, the browser's events, tokens shared
// by tabs, and what applications are told. The socket is a double; nothing here listens anywhere.

import assert from "node:assert/strict";
import { afterEach, test } from "node:test";

import * as chat from "../../chatserver/web/chat.js";

const URL_ = "ws://chat.example/v1/ws";
const LIMITS = { frame_bytes: 65536, rooms: 256, key_window: 600_000, history: 1000, replay: 1000 };

/** A network with one server, which the test plays. */
function network() {
  const sockets = [];
  const arrivals = [];
  class Socket {
    heard = [];
    waiting = [];

    constructor(url, protocols) {
      Object.assign(this, { url, protocols });
      sockets.push(this);
      arrivals.splice(0).forEach((resolve) => resolve());
    }

    send(text) {
      this.heard.push(JSON.parse(text));
      this.waiting.splice(0).forEach((resolve) => resolve());
    }

    close(code) {
      this.closed = code ?? 1005;
    }

    async expect(type) {
      while (this.heard.length === 0) await new Promise((resolve) => this.waiting.push(resolve));
      const frame = this.heard.shift();
      assert.equal(frame.type, type);
      return frame;
    }

    say(type, fields) {
      this.onmessage({ data: JSON.stringify({ type, ...fields }) });
    }

    ack(command, fields) {
      this.say("ack", { id: command.id, ...fields });
    }

    welcome({ user = "alice", ...limits } = {}) {
      this.onopen();
      const [ts, expires_at] = [Date.now(), Date.now() + 900_000];
      this.say("welcome", {
        protocol: 1, connection: "c", session: "s", user, roles: [], ts, expires_at,
        ping_interval: 25_000, limits: { ...LIMITS, ...limits },
      });
    }

    async admit(offset, more = {}) {
      const join = await this.expect("join");
      this.ack(join, { room: join.room, epoch: "e", offset, rights: "rw", replay: 0, ...more });
      return join;
    }

    message(offset, body = offset) {
      this.say("message", { room: "general", offset, ts: 1, user: "bob", body });
    }

    drop(code = 1006) {
      this.onclose({ code, reason: "" });
    }
  }
  const arrival = async (n = 0) => {
    while (sockets.length <= n) await new Promise((resolve) => arrivals.push(resolve));
    return sockets[n];
  };
  return { Socket, sockets, arrival };
}

const open = [];
function connect(net, options = {}) {
  const client = chat.connect(URL_, {
    token: "t0", backoff: [0, 0], WebSocket: net.Socket, fetch: () => Promise.reject(), ...options,
  });
  open.push(client);
  return client;
}
afterEach(() => open.splice(0).forEach((client) => client.close()));

/** A connected client in the room "general", at offset 0. */
async function inRoom(options) {
  const net = network();
  const client = connect(net, options);
  const socket = await net.arrival();
  socket.welcome();
  const joining = client.join("general");
  await socket.admit(0);
  return { net, client, socket, room: await joining };
}

async function take(room, count) {
  const events = [];
  if (count === 0) return events;
  for await (const event of room) if (events.push(event) === count) break;
  return events;
}

const rejects = (promise, Kind) => assert.rejects(promise, (error) => error instanceof Kind);
const answer = (status, body, headers = {}) => new Response(JSON.stringify(body), { status, headers });
const refusal = (status, code, headers) => answer(status, { error: { code, message: "No." } }, headers);

function until(client, name) {
  return new Promise((resolve) => {
    const look = (state) => state.name === name && resolve(state);
    client.watch(look);
    look(client.state);
  });
}

// Connecting.

test("the token travels as a sub-protocol and never in the URL", async () => {
  const net = network();
  connect(net);
  const socket = await net.arrival();
  assert.deepEqual([socket.url, socket.protocols], [URL_, ["chat.v1", "bearer.t0"]]);
});

test("an HTTP URL is understood, and what can be no URL or token is a TypeError", () => {
  const net = network();
  connect(net, {});
  open.push(chat.connect("http://chat.example/v1/ws", { token: "t", WebSocket: net.Socket }));
  assert.equal(net.sockets.length, 2);
  assert.equal(net.sockets[1].url, URL_);
  for (const [url, token] of [["/v1/ws", "t"], [`${URL_}?a=b`, "t"], [URL_, "a b"], [URL_, ""]]) {
    assert.throws(() => chat.connect(url, { token, WebSocket: net.Socket }), TypeError);
  }
  assert.throws(() => connect(net, { queue: 0 }), TypeError);
});

test("states are told in order, with why and until when", async () => {
  const net = network();
  const client = connect(net, { backoff: [1, 1] });
  const seen = [];
  client.watch(({ name }) => seen.push(name));
  const socket = await net.arrival();
  socket.welcome();
  await client.opened();
  socket.drop(1011);
  const waiting = await until(client, "waiting");
  assert.equal(waiting.why.code, 1011);
  assert.ok(waiting.until >= Date.now() - 5);
  (await net.arrival(1)).welcome();
  await until(client, "open");
  client.close();
  await until(client, "closed");
  assert.deepEqual(seen, ["open", "waiting", "connecting", "open", "closed"]);
  assert.equal(client.state.why, undefined);
});

test("a failed handshake is asked about over HTTP: 426 means that the token is good", async () => {
  const net = network();
  const asked = [];
  const client = connect(net, {
    fetch: async (url, { headers }) => {
      asked.push([url, headers.Authorization]);
      return refusal(426, "upgrade_required");
    },
  });
  (await net.arrival()).drop();
  (await net.arrival(1)).welcome();
  await client.opened();
  assert.deepEqual(asked, [["http://chat.example/v1/ws", "Bearer t0"]]);
});

test("a handshake that a proxy refuses with a 426 is no refusal for good", () => {
  const finals = [400, 426].map((status) => new chat.RefusedError(status, "no").final);
  assert.deepEqual(finals, [true, false]);
});

test("a refusal for good closes the client with the reason", async () => {
  const net = network();
  const client = connect(net, {
    token: async () => "t", fetch: async () => refusal(403, "origin_denied"),
  });
  (await net.arrival()).drop();
  const { why } = await until(client, "closed");
  assert.deepEqual([why.status, why.code, why.final], [403, "origin_denied", true]);
  await assert.rejects(client.opened(), why);
  await assert.rejects(client.join("general"), why);
});

/** The tokens that a client shows, all of which are refused, until it is closed. */
async function shown(code, token) {
  const net = network();
  const client = connect(net, { token, fetch: async () => refusal(401, code) });
  let refused = 0;
  client.watch(({ name }) => {
    if (name === "connecting") net.arrival(refused++).then((socket) => socket.drop());
  });
  (await net.arrival(refused++)).drop();
  const { why } = await until(client, "closed");
  assert.deepEqual([why.status, why.code], [401, code]);
  return net.sockets.map(({ protocols }) => protocols[1].replace("bearer.", ""));
}

test("a token that was refused is never shown again, and the second one is the last", async () => {
  let calls = 0;
  const fresh = async () => `t${++calls}`;
  for (const code of ["token_revoked", "token_invalid"]) {
    calls = 0;
    assert.deepEqual(await shown(code, fresh), ["t1", "t2"]);
    assert.deepEqual(await shown(code, async () => "t1"), ["t1"]);
    assert.deepEqual(await shown(code, "t1"), ["t1"]);
  }
  assert.deepEqual(await shown("token_expired", async () => `t${Math.min(++calls, 5)}`),
    ["t3", "t4", "t5"]);
});

test("after 4401 a newer token that has not been shown yet is good enough", async () => {
  let calls = 0;
  const { net, client, socket } = await inRoom({ token: async () => `t${Math.min(++calls, 2)}` });
  socket.say("expiring", { expires_at: 1 });
  await socket.expect("refresh");
  socket.drop(4401);
  const next = await net.arrival(1);
  assert.equal(next.protocols[1], "bearer.t2");
  next.welcome();
  await until(client, "open");
});

test("a token that is a string cannot be replaced: 4401 is the end", async () => {
  const { client, socket } = await inRoom();
  socket.drop(4401);
  assert.equal((await until(client, "closed")).why.code, 4401);
});

test("a token function is told which token is stale, and asked once for all that want it", async () => {
  const asked = [];
  const token = async (wanted) => `t${asked.push(wanted)}`;
  const { client, socket } = await inRoom({ token });
  const both = Promise.all([client.refresh(), client.refresh()]);
  const refresh = await socket.expect("refresh");
  assert.equal(refresh.token, "t2");
  socket.ack(refresh, { expires_at: 5, roles: ["guest"], left: [] });
  assert.deepEqual((await both)[0], { expires_at: 5, roles: ["guest"], left: [] });
  assert.equal(client.expires_at, 5);
  assert.deepEqual(asked, [{ stale: undefined, now: false }, { stale: "t1", now: false }]);
});

test("a refresh waits for the connection, and survives its loss", async () => {
  const net = network();
  const client = connect(net);
  const refreshing = client.refresh("t1");
  const socket = await net.arrival();
  socket.welcome();
  assert.equal((await socket.expect("refresh")).token, "t1");
  socket.drop();
  const again = await net.arrival(1);
  again.welcome();
  again.ack(await again.expect("refresh"), { expires_at: 5, roles: [], left: [] });
  assert.equal((await refreshing).expires_at, 5);
  again.drop();
  assert.equal((await net.arrival(2)).protocols[1], "bearer.t1");
});

test("a refresh that is refused for now is repeated", async () => {
  const { client, socket } = await inRoom();
  const refreshing = client.refresh("t1");
  const { id } = await socket.expect("refresh");
  socket.say("error", { id, code: "unavailable", message: "No.", retry_after: 1 });
  const again = await socket.expect("refresh");
  assert.equal(again.token, "t1");
  socket.ack(again, { expires_at: 5, roles: [], left: [] });
  assert.equal((await refreshing).expires_at, 5);
});

test("a token function that fails is asked again", async () => {
  const net = network();
  let calls = 0;
  const client = connect(net, {
    token: async () => {
      if (++calls < 3) throw new Error("offline");
      return "good";
    },
  });
  (await net.arrival()).welcome();
  await client.opened();
  assert.equal(calls, 3);
});

test("a new token of another user is the end, for keys and positions are one user's own", async () => {
  const { net, client, socket } = await inRoom();
  socket.drop();
  (await net.arrival(1)).welcome({ user: "mallory" });
  assert.equal((await until(client, "closed")).why.code, "identity_mismatch");
});

test("what is not the protocol ends the connection, and the client comes back", async () => {
  const { net, client, socket } = await inRoom();
  socket.onmessage({ data: "{" });
  const again = await net.arrival(1);
  again.welcome();
  const join = await again.admit(0, { offset: "seven" });
  assert.deepEqual(join.since, { epoch: "e", offset: 0 });
  (await net.arrival(2)).welcome();
  await (await net.arrival(2)).admit(0);
  assert.equal(client.state.name, "open");
});

test("a welcome without an interval for pings is none: they would not end", async () => {
  const net = network();
  connect(net);
  const socket = await net.arrival();
  socket.onopen();
  socket.say("welcome", { user: "alice", ping_interval: 0, limits: LIMITS });
  await net.arrival(1);
  assert.deepEqual(socket.heard, []);
});

test("what is further away than a timer reaches does not come at once", async () => {
  const far = 2 ** 40;
  const { net, client, socket } = await inRoom({ deadline: Infinity });
  const sending = rejects(client.send("general", 1), chat.DisconnectedError);
  const error = { code: "rate_limited", message: "No.", retry_after: far };
  socket.say("error", { id: (await socket.expect("send")).id, ...error });
  const asking = rejects(client.history("general"), chat.DisconnectedError);
  await socket.expect("history");
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.deepEqual(socket.heard, []);
  socket.say("bye", { code: 1012, reason: "draining", after: far });
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.equal(net.sockets.length, 1);
  client.close();
  await Promise.all([sending, asking]);
});

test("the network's return ends the wait, but not one that the server asked for", async () => {
  for (const told of [false, true]) {
    const net = network();
    const client = connect(net, { backoff: [60_000, 60_000] });
    const socket = await net.arrival();
    socket.welcome();
    if (told) socket.say("bye", { code: 1012, reason: "draining", after: 60_000 });
    else socket.drop();
    await until(client, "waiting");
    client.wake();
    await new Promise(setImmediate);
    assert.equal(net.sockets.length, told ? 1 : 2);
  }
});

test("a browser's events wake the client, until it is closed", async () => {
  const page = new EventTarget();
  const window = new EventTarget();
  Object.assign(globalThis, {
    document: Object.assign(page, { visibilityState: "visible" }),
    addEventListener: window.addEventListener.bind(window),
    removeEventListener: window.removeEventListener.bind(window),
  });
  try {
    const { client, socket } = await inRoom();
    window.dispatchEvent(new Event("online"));
    socket.ack(await socket.expect("ping"), { ts: 1 });
    page.dispatchEvent(new Event("visibilitychange"));
    socket.ack(await socket.expect("ping"), { ts: 1 });
    page.visibilityState = "hidden";
    page.dispatchEvent(new Event("visibilitychange"));
    client.close();
    window.dispatchEvent(new Event("online"));
    assert.deepEqual(socket.heard, []);
    assert.equal(socket.closed, 1000);
  } finally {
    for (const name of ["document", "addEventListener", "removeEventListener"]) {
      delete globalThis[name];
    }
  }
});

test("a connection that does not answer when it is woken is left, and one that does is kept", async () => {
  const { net, client, socket } = await inRoom();
  client.wake();
  socket.ack(await socket.expect("ping"), { ts: 1 });
  await new Promise((resolve) => setTimeout(resolve, 3_100));
  assert.equal(net.sockets.length, 1);
  client.wake();
  await socket.expect("ping");
  const next = await net.arrival(1);
  next.welcome();
  const join = await next.admit(0, { recovered: true });
  assert.deepEqual(join.since, { epoch: "e", offset: 0 });
  assert.deepEqual(client.state.name, "open");
});

// Rooms.

test("a full queue lets events go, and they are asked for once it is empty", async () => {
  const { net, socket, room } = await inRoom({ queue: 3 });
  for (let offset = 1; offset <= 7; offset++) socket.message(offset);
  assert.deepEqual(socket.heard, []);
  assert.equal(room.joined, false);
  const taking = take(room, 6);
  const join = await socket.admit(8, { replay: 5, recovered: true });
  assert.deepEqual(join.since, { epoch: "e", offset: 3 });
  for (let offset = 4; offset <= 8; offset++) {
    socket.message(offset);
    await new Promise(setImmediate);
  }
  assert.deepEqual((await taking).map((event) => event.body), [1, 2, 3, 4, 5, 6]);
  assert.equal(net.sockets.length, 1);
});

test("a full room is not joined on a new connection before somebody takes its events", async () => {
  const { net, socket, room } = await inRoom({ queue: 1 });
  socket.message(1);
  socket.message(2);
  socket.drop();
  const again = await net.arrival(1);
  again.welcome();
  await new Promise(setImmediate);
  assert.deepEqual(again.heard, []);
  const taking = take(room, 2);
  const join = await again.admit(2, { replay: 1, recovered: true });
  assert.equal(join.since.offset, 1);
  again.message(2);
  assert.deepEqual((await taking).map((event) => event.body), [1, 2]);
});

test("the position is that of the last event handed out, and a break leaves the rest", async () => {
  const { socket, room } = await inRoom();
  for (const offset of [1, 2, 3]) socket.message(offset);
  await take(room, 1);
  assert.deepEqual(room.position, { epoch: "e", offset: 1 });
  assert.deepEqual((await take(room, 2)).map((event) => event.body), [2, 3]);
});

test("joining again, leaving and closing end the iteration; a final code throws", async () => {
  const { client, socket, room } = await inRoom();
  const first = take(room, 9);
  const joining = client.join("general");
  await socket.admit(0);
  const second = await joining;
  assert.deepEqual(await first, []);
  await room.leave(); // It has ended, and the other is none of its business.
  assert.equal(second.joined, true);
  const leaving = second.leave();
  socket.ack(await socket.expect("leave"), { room: "general" });
  await leaving;
  assert.deepEqual(await take(second, 9), []);
  const again = client.join("general");
  await socket.admit(0);
  const third = take(await again, 9);
  socket.say("bye", { code: 4503, reason: "session_revoked" });
  await assert.rejects(third, (error) => error.code === 4503 && error.final);
});

test("a join that is refused rejects, and one that is given up as well", async () => {
  const { client, socket } = await inRoom();
  const refused = client.join("secret");
  const { id } = await socket.expect("join");
  socket.say("error", { id, code: "forbidden", message: "No." });
  await assert.rejects(refused, (error) => error.code === "forbidden" && !error.temporary);
  const given = client.join("other");
  await socket.expect("join");
  const leaving = client.leave("other");
  await rejects(given, chat.ChatError);
  socket.ack({ id: 3 }, { room: "other", epoch: "e", offset: 1, rights: "r", replay: 0 });
  socket.ack(await socket.expect("leave"), { room: "other" });
  await leaving;
});

test("a join has a deadline, and is left again in case that the server let it in", async () => {
  const { client, socket } = await inRoom({ deadline: 20 });
  const joining = client.join("other");
  await socket.expect("join");
  await rejects(joining, chat.TimeoutError);
  assert.equal((await socket.expect("leave")).room, "other");
  const net = network();
  await rejects(connect(net, { deadline: 20 }).join("general"), chat.TimeoutError);
  (await net.arrival()).welcome();
  assert.deepEqual((await net.arrival()).heard, []);
});

// Commands.

test("messages of one room go one after the other, those of others do not wait", async () => {
  const { socket, client, room } = await inRoom();
  const sends = [room.send(1), room.send(2), client.send("other", 3)];
  const [one, three] = [await socket.expect("send"), await socket.expect("send")];
  assert.deepEqual([one.body, three.body, socket.heard.length], [1, 3, 0]);
  socket.ack(one, { room: "general", epoch: "e", offset: 1, ts: 1 });
  socket.ack(three, { room: "other", epoch: "e", offset: 7, ts: 1 });
  socket.ack(await socket.expect("send"), { room: "general", epoch: "e", offset: 2, ts: 1 });
  assert.deepEqual((await Promise.all(sends)).map(({ offset }) => offset), [1, 2, 7]);
});

test("a body is what it was when it was sent, and what is no JSON is a TypeError", async () => {
  const { socket, room } = await inRoom();
  const body = { text: "\ud800 \"}" };
  const sending = room.send(body, { key: "k", echo: false });
  body.text = "changed";
  const send = await socket.expect("send");
  assert.deepEqual([send.body, send.key, send.echo], [{ text: "\ud800 \"}" }, "k", false]);
  socket.ack(send, { room: "general", epoch: "e", offset: 1, ts: 1 });
  await sending;
  await rejects(room.send(undefined), TypeError);
  await rejects(room.send(1n), TypeError);
});

test("what is too large is refused here, for the server would close", async () => {
  const { socket, room } = await inRoom();
  await assert.rejects(room.send("ä".repeat(40_000)), (error) => error.code === "too_large");
  assert.deepEqual(socket.heard, []);
});

test("more than the outbox holds is rejected at once", async () => {
  const { room } = await inRoom({ outbox: 2 });
  const waiting = [room.send(1), room.send(2)];
  await rejects(room.send(3), chat.OverflowError);
  open.at(-1).close();
  await rejects(waiting[0], chat.UnknownOutcomeError);
  await assert.rejects(waiting[1], (error) => error.code === 1000);
});

test("the end of the client tells what may have been stored from what was not", async () => {
  const { socket, room } = await inRoom();
  const [sent, unsent] = [room.send(1, { key: "k1" }), room.send(2)];
  socket.say("bye", { code: 4503, reason: "session_revoked" });
  await assert.rejects(sent, (error) => error.key === "k1" && error.why.code === 4503);
  await assert.rejects(unsent, (error) => error instanceof chat.DisconnectedError);
});

test("a refusal after a doubt leaves the doubt", async () => {
  const { socket, room } = await inRoom();
  const sending = room.send(1);
  const code = (name) => ({ code: name, message: "No." });
  socket.say("error", { id: (await socket.expect("send")).id, ...code("unavailable") });
  socket.say("error", { id: (await socket.expect("send")).id, ...code("forbidden") });
  await rejects(sending, chat.UnknownOutcomeError);
});

test("a command has a deadline, whatever number of connections it takes", async () => {
  const net = network();
  const client = connect(net, { deadline: 30 });
  await rejects(client.history("general"), chat.TimeoutError);
  (await net.arrival()).welcome();
  await rejects(client.ping(), chat.TimeoutError);
});

test("a history is asked for again on the next connection", async () => {
  const { net, socket, room } = await inRoom();
  const reading = room.history({ before: 9, limit: 2 });
  assert.equal((await socket.expect("history")).before, 9);
  socket.drop();
  const again = await net.arrival(1);
  again.welcome();
  await again.admit(0);
  const events = [
    { type: "message", room: "general", offset: 7, ts: 1, user: "bob", body: 7 },
    { type: "later", room: "general", offset: 8 },
  ];
  const history = await again.expect("history");
  again.ack(history, { room: "general", epoch: "e", offset: 20, events, more: true });
  const page = await reading;
  assert.deepEqual([page.first, page.last, page.more, page.position.offset], [7, 8, true, 20]);
  assert.deepEqual(page.messages.map((message) => message.body), [7]);
});

test("a reply that is passed over ends the connection: it will never come", async () => {
  const { net, client, socket, room } = await inRoom();
  const sending = room.send(1);
  const send = await socket.expect("send");
  const ping = client.ping();
  socket.ack(await socket.expect("ping"), { ts: 1 });
  const again = await net.arrival(1);
  again.welcome();
  await again.admit(0);
  for (const _ of [1, 2]) {
    const command = again.heard.shift();
    if (command.type === "send") assert.equal(command.key, send.key);
    again.ack(command, { room: "general", epoch: "e", offset: 1, ts: 5 });
  }
  assert.equal((await sending).offset, 1);
  assert.equal(await ping, 5);
});

test("a logout closes without an error, also when only the end of it is seen", async () => {
  for (const acked of [true, false]) {
    const { client, socket, room } = await inRoom();
    const taking = take(room, 9);
    const leaving = client.logout();
    const logout = await socket.expect("logout");
    if (acked) socket.ack(logout);
    else socket.say("bye", { code: 4503, reason: "session_revoked" });
    await leaving;
    assert.deepEqual(client.state, { name: "closed", why: undefined });
    assert.deepEqual(await taking, []);
  }
});

test("keys are random UUIDs, with or without what the platform offers", async () => {
  const real = globalThis.crypto;
  const offers = [real, { getRandomValues: (bytes) => real.getRandomValues(bytes) }, undefined];
  const keys = new Set();
  for (const crypto of offers) {
    Object.defineProperty(globalThis, "crypto", { value: crypto, configurable: true });
    const { socket, room } = await inRoom();
    room.send(1).catch(() => {});
    keys.add((await socket.expect("send")).key);
  }
  Object.defineProperty(globalThis, "crypto", { value: real, configurable: true });
  assert.equal(keys.size, 3);
  for (const key of keys) assert.match(key, /^[\da-f]{8}-[\da-f]{4}-4[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}$/);
});

// The token keeper.

const pair = (n, left = 900_000) => ({
  access_token: `access-${n}`, refresh_token: `refresh-${n}`, session: "s",
  expires_at: Date.now() + left, refresh_expires_at: Date.now() + 9_000_000,
});

test("a pair that is fresh is used, and one that is not is traded for the next", async () => {
  const asked = [];
  const fetch = async (url, { method, headers }) => {
    asked.push([url, method, headers.Authorization]);
    return answer(200, pair(2));
  };
  const saved = [];
  const keeper = chat.tokenKeeper(URL_, pair(1), { fetch, save: (next) => saved.push(next) });
  assert.equal(await keeper(), "access-1");
  assert.equal(await keeper({ stale: "access-1" }), "access-2");
  assert.equal(await keeper({ stale: "access-1" }), "access-2");
  assert.deepEqual(asked, [
    ["http://chat.example/v1/tokens/refresh", "POST", "Bearer refresh-1"],
  ]);
  assert.deepEqual([saved.length, keeper.pair.refresh_token], [1, "refresh-2"]);
});

test("a save that fails is tried again before anything is used, without another trade", async () => {
  let trades = 0;
  let saves = 0;
  const keeper = chat.tokenKeeper(URL_, pair(1, 0), {
    fetch: async () => answer(200, pair(++trades + 1)),
    save: async () => {
      if (++saves === 1) throw new Error("disk full");
    },
  });
  await assert.rejects(keeper(), /disk full/);
  assert.equal(keeper.pair.access_token, "access-1");
  assert.equal(await keeper(), "access-2");
  assert.deepEqual([trades, saves], [1, 2]);
});

test("a lost answer is asked for with the same token, and a refusal for good never again", async () => {
  const presented = [];
  const answers = [null, answer(500, {}), refusal(401, "token_revoked")];
  const keeper = chat.tokenKeeper(URL_, pair(1, 0), {
    fetch: async (_, { headers }) => {
      presented.push(headers.Authorization);
      const next = answers.shift();
      if (next === null) throw new TypeError("network error");
      return next;
    },
  });
  await rejects(keeper(), chat.TokenRefusedError);
  await rejects(keeper(), chat.TokenRefusedError);
  assert.deepEqual(presented, Array(3).fill("Bearer refresh-1"));
});

test("a token goes where it was sent, and follows no redirect", async () => {
  const told = [];
  const fetch = async (_, options) => {
    told.push(options.redirect);
    throw new TypeError("a redirect");
  };
  const net = network();
  const client = connect(net, { fetch });
  (await net.arrival()).drop();
  await until(client, "waiting");
  await rejects(chat.tokenKeeper(URL_, pair(1, 0), { fetch })(), chat.DisconnectedError);
  assert.deepEqual([...new Set(told)], ["error"]);
});

test("a token that is refused for good closes the client", async () => {
  const net = network();
  const token = chat.tokenKeeper(URL_, pair(1, 0), { fetch: async () => refusal(401, "x") });
  const { why } = await until(connect(net, { token }), "closed");
  assert.ok(why instanceof chat.TokenRefusedError);
  assert.equal(net.sockets.length, 0);
});

test("tabs that share a pair trade it once, one at a time", async () => {
  let shared = pair(1, 0);
  let busy = Promise.resolve();
  let trades = 0;
  const options = {
    load: () => shared,
    save: (next) => (shared = next),
    fetch: async () => answer(200, pair(++trades + 1)),
    locks: {
      request(name, work) {
        assert.equal(name, "chatserver s");
        return (busy = busy.then(work));
      },
    },
  };
  const tabs = [1, 2, 3].map(() => chat.tokenKeeper(URL_, pair(1, 0), options));
  const tokens = await Promise.all(tabs.map((tab) => tab({ stale: "access-1" })));
  assert.deepEqual(tokens, ["access-2", "access-2", "access-2"]);
  assert.equal(trades, 1);
});
