// The scenarios of scripts/loadtest for users of k6, as far as k6 can: it cannot stop reading a
// socket, so there is no `slow`. What to give it is in docs/loadtest.md.
//
//   k6 run -e SCENARIO=fanout -e CLIENTS=200 -e CHATSERVER_SECRET=… scripts/k6/chat.js
//
// A virtual user is a connection. As in scripts/loadtest, times count from the moment something
// was meant to begin, and offsets tell what was lost or doubled.

import crypto from "k6/crypto";
import { SharedArray } from "k6/data";
import encoding from "k6/encoding";
import exec from "k6/execution";
import http from "k6/http";
import { Counter, Trend } from "k6/metrics";
import { WebSocket } from "k6/websockets";

const text = (name, usual) => __ENV[name] || usual;
const number = (name, usual) => Number(text(name, usual));

const SCENARIO = text("SCENARIO", "fanout");
const URL = text("URL", "ws://127.0.0.1:8000/v1/ws");
const CONTROL = text("CONTROL", "http://127.0.0.1:8001");
const CLIENTS = number("CLIENTS", 100);
const ROOMS = number("ROOMS", Math.max(1, Math.floor(CLIENTS / 10)));
const RAMP = number("RAMP", 100); // connects per second
const DURATION = number("DURATION", 10) * 1000;
const SHARE = number("SHARE", SCENARIO === "reconnect" ? 1 : 0.1);

const BEHAVIOURS = {
  connect: { publishers: 0, start: () => {} },
  fanout: { publishers: number("PUBLISHERS", ROOMS), start: () => {} },
  chat: { publishers: 0, start: (client) => client.talk() },
  refresh: { publishers: number("PUBLISHERS", ROOMS), start: (client) => client.refreshOnce() },
  reconnect: { publishers: number("PUBLISHERS", ROOMS), start: (client) => client.dropOnce() },
  revoke: { publishers: number("PUBLISHERS", ROOMS), start: (client) => client.revokeOnce() },
};
const behaviour = BEHAVIOURS[SCENARIO];
if (!behaviour) {
  throw new Error(`SCENARIO is one of ${Object.keys(BEHAVIOURS).join(", ")}`);
}
const PUBLISHERS = behaviour.publishers;
const RATE = number("RATE", SCENARIO === "chat" ? CLIENTS / 2 : PUBLISHERS * 2); // per second in all

// Every client is in by LOAD, in ms since the start; SETTLE is for what is still on its way.
const LOAD = ((CLIENTS + PUBLISHERS) / RAMP) * 1000 + 2000;
const SETTLE = 3000;

export const options = {
  scenarios: {
    chat: {
      executor: "per-vu-iterations",
      vus: CLIENTS + PUBLISHERS,
      iterations: 1,
      maxDuration: `${Math.ceil((LOAD + DURATION + SETTLE) / 1000) + 30}s`,
    },
  },
  thresholds: { connects: ["count>0"], lost: ["count==0"], doubled: ["count==0"] },
  summaryTrendStats: ["min", "med", "p(90)", "p(99)", "p(99.9)", "max", "count"],
};

const times = {};
for (const name of ["connect", "join", "ack", "delivery", "history", "refresh", "recovery", "revocation"]) {
  times[name] = new Trend(`${name}_ms`, true);
}
const counts = {};
for (const name of [
  "connects", "sends", "acks", "deliveries", "lost", "doubled", "errors", "closed", "refused",
  "recovered", "unrecovered", "revoked",
]) {
  counts[name] = new Counter(name);
}

// -- tokens ----------------------------------------------------------------------------------

const given = new SharedArray("tokens", () =>
  __ENV.TOKENS ? open(__ENV.TOKENS).split("\n").filter(Boolean) : [],
);

/** One from the file TOKENS, or one that is made with CHATSERVER_SECRET: docs/tokens.md. */
function tokenOf(run, index) {
  if (given.length) return given[index % given.length];
  const secret = __ENV.CHATSERVER_SECRET;
  if (!secret) throw new Error("give -e TOKENS=file or -e CHATSERVER_SECRET=…");
  const now = Math.floor(Date.now() / 1000);
  const kid = crypto.hmac("sha256", secret, "chatserver kid v1", "base64rawurl").slice(0, 16);
  const header = { alg: "HS256", typ: "at+jwt", kid };
  const claims = {
    iss: "chatserver",
    aud: "chatserver",
    sub: `${run}-${index}`,
    sid: `s-${run}-${index}`,
    jti: `${run}-${index}-${Date.now()}-${Math.random()}`,
    iat: now,
    exp: now + 900,
    roles: ["member"],
  };
  const signed = [header, claims]
    .map((part) => encoding.b64encode(JSON.stringify(part), "rawurl"))
    .join(".");
  return `${signed}.${crypto.hmac("sha256", secret, signed, "base64rawurl")}`;
}

// -- a client --------------------------------------------------------------------------------

class Client {
  constructor(run, index, began) {
    this.run = run;
    this.index = index;
    this.began = began;
    this.rooms = [];
    this.positions = {}; // by room: {epoch, last}
    this.waiting = {}; // by id: {kind, due}
    this.ids = 0;
    this.over = false;
    if (index < CLIENTS && SCENARIO !== "connect") this.rooms = [this.room(index)];
  }

  room(n) {
    return `${this.run}-${n % ROOMS}`;
  }

  /** Do something at a moment, in ms since the start of the run; it is told the moment itself. */
  at(moment, action) {
    const due = this.began + moment;
    setTimeout(() => this.over || action(due), Math.max(0, due - Date.now()));
  }

  enter(due, droppedAt) {
    this.token = tokenOf(this.run, this.index);
    const socket = new WebSocket(URL, null, { headers: { Authorization: `Bearer ${this.token}` } });
    this.socket = socket;
    let welcomed = false;
    socket.addEventListener("message", (event) => {
      const frame = JSON.parse(event.data);
      if (frame.type === "welcome") {
        welcomed = true;
        this.session = frame.session;
        counts.connects.add(1);
        if (!droppedAt) times.connect.add(Date.now() - due);
        for (const room of this.rooms) this.join(room, droppedAt || Date.now());
      }
      this.receive(frame);
    });
    socket.addEventListener("error", () => welcomed || counts.refused.add(1));
    socket.addEventListener("close", (event) => {
      if (this.over || socket !== this.socket) return;
      if (welcomed) counts.closed.add(1, { code: String(event.code) });
      if (event.code === 4503 && this.revokedAt) {
        times.revocation.add(Date.now() - this.revokedAt);
      } else if (event.code < 4500 && event.code !== 1000) {
        this.comeBack(welcomed ? Date.now() : droppedAt, due);
      }
    });
  }

  /** Full jitter, as docs/protocol.md has it for the first try. */
  comeBack(droppedAt, due) {
    setTimeout(() => this.over || this.enter(due, droppedAt), Math.random() * 1000);
  }

  ask(kind, due, fields) {
    if (!this.socket || this.socket.readyState !== 1) {
      counts.errors.add(1, { code: "not connected" });
      return;
    }
    const id = ++this.ids;
    this.waiting[id] = { kind, due, ...fields };
    this.socket.send(JSON.stringify({ type: kind, id, ...fields }));
  }

  join(room, due) {
    const since = this.positions[room];
    const fields = since ? { since: { epoch: since.epoch, offset: since.last } } : {};
    this.ask("join", due, { room, ...fields });
  }

  publish(room, due) {
    counts.sends.add(1);
    const key = `${this.run}-${this.index}-${this.ids}`;
    this.ask("send", due, { room, key, body: { t: due, text: "x".repeat(number("BYTES", 100)) } });
  }

  receive(frame) {
    const asked = this.waiting[frame.id];
    delete this.waiting[frame.id];
    if (frame.type === "error") {
      counts.errors.add(1, { code: frame.code });
    } else if (frame.type === "ack" && asked) {
      this.acked(asked, frame);
    } else if (frame.type === "epoch" && this.positions[frame.room]) {
      this.positions[frame.room].epoch = frame.epoch;
    } else if (frame.type === "reset") {
      this.positions[frame.room] = { epoch: frame.epoch, last: frame.offset };
    } else if (frame.room && frame.offset) {
      this.place(frame);
    }
  }

  acked(asked, frame) {
    const took = Date.now() - asked.due;
    if (asked.kind === "send") {
      counts.acks.add(1);
      times.ack.add(took);
    } else if (asked.kind === "join") {
      const start = frame.offset - frame.replay;
      const had = this.positions[asked.room];
      if (had) {
        // Where the server proves that nothing is missing, it goes on exactly here.
        counts[frame.recovered ? "recovered" : "unrecovered"].add(1);
        if (frame.recovered && start > had.last) counts.lost.add(start - had.last);
        if (frame.recovered && start < had.last) counts.doubled.add(had.last - start);
        times.recovery.add(took);
      } else {
        times.join.add(took);
      }
      this.positions[asked.room] = { epoch: frame.epoch, last: start };
    } else if (asked.kind === "leave") {
      delete this.positions[asked.room];
    } else {
      times[asked.kind].add(took);
    }
  }

  place(frame) {
    const position = this.positions[frame.room];
    if (!position) return;
    if (frame.offset <= position.last) {
      counts.doubled.add(1);
      return;
    }
    if (frame.offset > position.last + 1) counts.lost.add(frame.offset - position.last - 1);
    position.last = frame.offset;
    if (frame.type === "message") {
      counts.deliveries.add(1);
      times.delivery.add(Date.now() - frame.body.t);
    }
  }

  // What the scenarios do.

  publishAtRate() {
    const number = this.index - CLIENTS;
    for (let n = number; (n / RATE) * 1000 < DURATION; n += PUBLISHERS) {
      this.at(LOAD + (n / RATE) * 1000, (due) => this.publish(this.room(number), due));
    }
  }

  /** Exponential times between what one client does: messages, a look back, another room. */
  talk() {
    const pause = () => (-Math.log(1 - Math.random()) * CLIENTS * 1000) / RATE;
    for (let moment = pause(); moment < DURATION; moment += pause()) {
      this.at(LOAD + moment, (due) => {
        const drawn = Math.random();
        if (drawn < 0.1) this.ask("history", due, { room: this.rooms[0], limit: 50 });
        else if (drawn < 0.2) this.move(due);
        else this.publish(this.rooms[0], due);
      });
    }
  }

  move(due) {
    const other = this.room(Math.floor(Math.random() * ROOMS));
    if (other === this.rooms[0]) return;
    this.ask("leave", due, { room: this.rooms[0] });
    this.rooms = [other];
    this.join(other, due);
  }

  refreshOnce() {
    this.at(LOAD + (this.index / CLIENTS) * DURATION, (due) =>
      this.ask("refresh", due, { token: tokenOf(this.run, this.index) }),
    );
  }

  dropOnce() {
    if (this.index % Math.round(1 / SHARE) !== 0) return;
    this.at(LOAD + DURATION / 4, (due) => {
      const socket = this.socket;
      this.socket = null;
      socket.close();
      this.comeBack(due, due);
    });
  }

  revokeOnce() {
    if (this.index % Math.round(1 / SHARE) !== 0) return;
    this.at(LOAD + (this.index / CLIENTS) * DURATION, (due) => {
      this.revokedAt = due;
      const body = JSON.stringify({ session: this.session });
      const headers = {
        Authorization: `Bearer ${__ENV.CHATSERVER_CONTROL_KEY}`,
        "Content-Type": "application/json",
      };
      http.asyncRequest("POST", `${CONTROL}/v1/revocations`, body, { headers }).then((answer) => {
        if (answer.status === 200) counts.revoked.add(1);
        else counts.errors.add(1, { code: `control ${answer.status}` });
      });
    });
  }
}

/** Names this run, for all virtual users the same: its rooms, users and keys begin with it. */
export function setup() {
  return text("RUN", `k6-${Date.now().toString(36)}`);
}

export default function (run) {
  const index = exec.vu.idInTest - 1;
  const client = new Client(run, index, exec.scenario.startTime);
  client.at((index / RAMP) * 1000, (due) => client.enter(due));
  if (index >= CLIENTS) client.publishAtRate();
  else behaviour.start(client);
  client.at(LOAD + DURATION + SETTLE, () => {
    client.over = true;
    if (client.socket) client.socket.close();
  });
}
