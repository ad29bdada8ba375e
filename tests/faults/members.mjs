// Many JavaScript clients in one process, for tests/faults/javascript.py: orders come in and records
// go out, one JSON object a line. The records are those of history.py; what an application sees of
// the client is one long stay in each room, in which only a gap says that something may be missing.

import { subscribe } from "node:diagnostics_channel";
import { createInterface } from "node:readline";

import { CommandError, TimeoutError, UnknownOutcomeError, connect } from "../../chatserver/web/chat.js";

const REST = [100, 500];
const DEADLINE = 5_000;
/** So few that a reader that pauses falls behind. */
const QUEUE = 64;
const BACKOFF = [500, 2_000];

const members = new Map();
/** Those who wait for a token, by the number of their question. */
const questions = new Map();

const write = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
const seconds = () => Date.now() / 1000;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const rest = () => sleep(REST[0] + Math.random() * (REST[1] - REST[0]));

/** Told just before the socket's own "open". */
let port = 0;
subscribe("undici:websocket:open", ({ address }) => {
  port = address.port;
});

function createMember({ member: name, rooms, readable, url }) {
  const places = new Map();
  const joined = new Map();
  const posts = new Set();
  let client;
  let connection = "";
  let connections = 0;
  let link = 0;
  let told = "";
  let reading = Promise.resolve();

  class Socket extends WebSocket {
    constructor(...how) {
      super(...how);
      this.addEventListener("open", () => {
        link = port;
        report();
      });
    }
  }

  const record = (type, fields) => write({ type, at: seconds(), member: name, ...fields });
  const inRoom = (type, room, fields) => record(type, { connection, room, ...fields });
  const strange = (error) => write({ type: "strange", member: name, text: error.stack });

  function report(over) {
    const open = client?.state.name === "open";
    const all = readable.every((room) => joined.get(room)?.joined);
    const now = { connected: open, joined: open && all, port: open ? link : 0 };
    const line = JSON.stringify(now);
    if (line !== told || over !== undefined) write({ type: "status", member: name, ...now, over });
    told = line;
  }

  /** One client, to its end. */
  async function live(session) {
    const began = seconds();
    const number = ++connections;
    const mine = connect(url, {
      token: () => ask(name), deadline: DEADLINE, queue: QUEUE, backoff: BACKOFF, WebSocket: Socket,
    });
    client = mine;
    mine.watch(() => report());
    let why;
    try {
      await mine.opened();
      connection = `${name}#${number}`;
      record("connected", { session, connection, began });
      // What has arrived is read to its end, as it would be by an application.
      await Promise.all(rooms.map((room) => stay(mine, room)));
    } catch (error) {
      why = error;
    }
    await new Promise((resolve) => {
      if (mine.state.name === "closed") resolve();
      mine.watch((state) => state.name === "closed" && resolve());
    });
    why = mine.state.why ?? why;
    // A token function that fails, or a link that lies, may end it in any of these ways.
    const code = why?.status ?? why?.code ?? 1000;
    if (connection !== "") record("closed", { connection, code: Number(code) || 1006 });
    connection = "";
    report(Number(code) || 1006);
  }

  /** Be in a room as long as the client is, with a walk outside now and then. */
  async function stay(mine, room) {
    while (mine.state.name !== "closed") {
      try {
        await visit(mine, room);
      } catch (error) {
        if (mine.state.name === "closed") return;
        if (error instanceof TimeoutError) {
          write({ type: "count", member: name, what: "join timed out" });
          continue;
        }
        if (!(error instanceof CommandError)) return strange(error);
        inRoom("left", room, { reason: error.code });
        write({ type: "count", member: name, what: `join ${error.code}` });
      }
      if (!readable.includes(room)) return;
      await rest();
    }
  }

  async function visit(mine, name) {
    const since = places.get(name);
    const room = await mine.join(name, { since });
    let recorded = room.recovered;
    joined.set(name, room);
    report();
    if (recorded) begin(name, room.position, since);
    let left = "asked";
    try {
      for await (const event of room) {
        if (event.type === "message") {
          receive(name, event);
        } else if (event.type === "left") {
          left = event.reason;
        } else if (recorded) {
          places.set(name, event.position);
          inRoom("reset", name, event.position);
        } else {
          begin(name, event.position);
          recorded = true;
        }
        report();
        await reading;
      }
      if (mine.state.name !== "closed") inRoom("left", name, { reason: left });
    } finally {
      joined.delete(name);
      report();
    }
  }

  function begin(room, start, since) {
    places.set(room, start);
    const recovered = since === undefined ? undefined : true;
    inRoom("joined", room, { ...start, replay: 0, since, recovered });
  }

  function receive(room, { position, key, ts }) {
    const { epoch } = position;
    if (epoch !== places.get(room).epoch) inRoom("epoch", room, { epoch });
    inRoom("received", room, { ...position, key, ts });
    places.set(room, position);
  }

  async function publish({ room, key, n, padding }) {
    const sent = { sender: name, sequence: n, room, key, began: seconds() };
    const settle = (outcome, more) => {
      if (!posts.delete(post)) return;
      const at = seconds();
      write({ type: "sent", at, ...sent, tried: sent.began, attempt: n, outcome, ...more });
    };
    const post = { settle };
    posts.add(post);
    if (client === undefined) return settle("failed", { code: "never began" });
    const body = { from: name, n, padding: "x".repeat(padding) };
    const on = `${name}#${connections}`;
    try {
      const position = await client.send(room, body, { key });
      settle("ok", { connection: on, ...position });
    } catch (error) {
      const outcome = error instanceof UnknownOutcomeError ? "unknown" : "failed";
      settle(outcome, { connection: on, code: error.message.slice(0, 100) });
    }
  }

  return {
    begin: ({ session }) => live(session).catch(strange),
    publish,
    wander: ({ room }) => joined.get(room)?.leave().catch(() => {}),
    pause({ seconds: long }) {
      reading = sleep(long * 1000);
    },
    async end_of({ room, question }) {
      const page = await client?.history(room, { limit: 1 }).catch(() => undefined);
      write({ type: "answer", member: name, question, value: page?.position ?? null });
    },
    abandon() {
      for (const post of posts) post.settle("unknown", { code: "abandoned" });
    },
    leave: () => client?.close(),
  };
}

function ask(member) {
  const question = questions.size === 0 ? 1 : Math.max(...questions.keys()) + 1;
  write({ type: "token", member, question });
  return new Promise((resolve, reject) => questions.set(question, { resolve, reject }));
}

function answer({ question, token }) {
  const { resolve, reject } = questions.get(question);
  questions.delete(question);
  if (token === null) reject(new Error("this member's login service is down"));
  else resolve(token);
}

process.on("unhandledRejection", (error) => {
  write({ type: "strange", member: "", text: String(error?.stack ?? error) });
});
createInterface({ input: process.stdin })
  .on("line", (line) => {
    const order = JSON.parse(line);
    if (order.do === "enlist") members.set(order.member, createMember(order));
    else if (order.do === "token") answer(order);
    else members.get(order.member)[order.do](order);
  })
  .on("close", () => process.exit());
