/**
 * The chatserver client for browsers, React Native and Node.js: one module without dependencies.
 *
 *     const client = connect("wss://chat.example/v1/ws", { token: fetchToken });
 *     const room = await client.join("general", { last: 20 });
 *     await room.send({ text: "hello" });
 *     for await (const event of room) console.log(event);
 *
 * It has the names and the behaviour of the Python client. Fields are named as on the wire, times
 * are milliseconds. In the order of the file: errors; a link, which is one connection; a room,
 * which knows what is new and what is missing; a client, which outlives its links; a token keeper.
 */

/** For one command, whatever number of connections it takes. */
const DEADLINE = 30_000;
/** For a connection with its welcome, for a token, and for an answer that is owed. */
const PATIENCE = 10_000;
/** So soon an answer must come when there is reason to doubt the connection. */
const PROBE = 3_000;
/** Events that wait in a room to be taken. */
const QUEUE = 1024;
/** Commands that wait for their answer. */
const OUTBOX = 256;
/** Full jitter: the limit of the first wait, and the longest. */
const BACKOFF = [1_000, 30_000];
/** Within a connection a refusal passes sooner than an outage. */
const LONGEST_AGAIN = 5_000;
/** After so long a connection was a good one, and what failed before it is forgotten. */
const STEADY = 10_000;
/** An access token that ends sooner is not worth a handshake. */
const SPENT = 5_000;

/** A token goes where it was sent and nowhere else, and its answer is kept nowhere. */
const PRIVATELY = { cache: "no-store", credentials: "omit", redirect: "error" };

const OWN_FAULTS = [1002, 1007];
const OWN_FAULT_TRIES = 3;
/** A function whose every token is refused has nothing better to give. */
const STRIKES = 2;

// --- errors ------------------------------------------------------------------------------------

/** Whatever the server, or the way to it, made of a request. */
export class ChatError extends Error {
  name = "ChatError";

  /** Whether coming back, with a good token, would end the same way. */
  get final() {
    return false;
  }
}

/** An HTTP answer that is no success. `code` is undefined when it was not chatserver's (a proxy's);
 *  `retry_after` is in milliseconds. */
export class RefusedError extends ChatError {
  name = "RefusedError";

  constructor(status, code, message, retry_after) {
    super(`refused with ${status} ${code ?? "and no code"}: ${message}`);
    Object.assign(this, { status, code, retry_after });
  }

  get final() {
    const { status, code } = this;
    // What does not come from chatserver is a deployment's: it passes.
    return code !== undefined && status < 500 && ![401, 408, 425, 426, 429].includes(status);
  }
}

/** The server does not take this refresh token, and never will: somebody has to log in. */
export class TokenRefusedError extends RefusedError {
  name = "TokenRefusedError";

  get final() {
    return true;
  }
}

/** The server's answer to a command is an error; the connection goes on. */
export class CommandError extends ChatError {
  name = "CommandError";

  constructor(code, message, { retry_after, path } = {}) {
    super(`${code}: ${message}${path ? ` (${path})` : ""}`);
    Object.assign(this, { code, retry_after, path });
  }

  /** Whether the same command may succeed a little later. */
  get temporary() {
    return this.doubtful || ["rate_limited", "token_expired"].includes(this.code);
  }

  /** Whether it may have taken effect all the same. */
  get doubtful() {
    return ["unavailable", "internal"].includes(this.code);
  }
}

/** There is no connection any more. `code` is the close code, 1006 where none came; `after` is how
 *  long the server wants one to stay away. */
export class DisconnectedError extends ChatError {
  name = "DisconnectedError";

  constructor(code, reason, after) {
    super(`disconnected with ${code} ${reason}`.trimEnd());
    Object.assign(this, { code, reason, after });
  }

  get final() {
    return this.code >= 4500;
  }
}

/** A message may have been stored or not, and it is too late to find out by sending it again. If
 *  its `key` is seen in a room, it was. `why` ended the tries: undefined when the server has
 *  forgotten the key by now. */
export class UnknownOutcomeError extends ChatError {
  name = "UnknownOutcomeError";

  constructor(key, why) {
    super(`whether message ${key} was stored is not known: ${why ?? "its key is forgotten"}`);
    Object.assign(this, { key, why });
  }
}

/** More is waiting to be answered than the client's `outbox` holds. */
export class OverflowError extends ChatError {
  name = "OverflowError";
}

/** No answer came within the deadline. */
export class TimeoutError extends ChatError {
  name = "TimeoutError";
}

async function refusal(response, Kind = RefusedError) {
  const seconds = response.headers.get("Retry-After") ?? "";
  const error = await response.json().then((body) => body.error, () => undefined);
  return new Kind(
    response.status,
    error?.code,
    error?.message ?? response.statusText,
    /^\d{1,6}$/.test(seconds) ? Number(seconds) * 1000 : undefined,
  );
}

// --- one link ----------------------------------------------------------------------------------

/**
 * One connection, from the handshake to its end. It matches replies with their commands and finds
 * out when nobody is there any more: a browser shows no WebSocket ping, so silence is asked with
 * the protocol's own, and what is owed an answer must not be silent for long.
 *
 * Calls back: `opened(welcome)`, `received(event)`, and once, at the end, `lost(error)`.
 */
function openLink({ url, token, WebSocket, fetch, opened, received, lost }) {
  const replies = new Map();
  const socket = new WebSocket(url, ["chat.v1", `bearer.${token}`]);
  let upgraded = false;
  let welcome;
  let over = false;
  let next = 1;
  let heard = performance.now();
  let asked = heard;
  let timer = later(PATIENCE, () => end(disconnected("no welcome came in time")));
  let probing;

  const disconnected = (reason) => new DisconnectedError(1006, reason);

  function end(error, code) {
    if (over) return;
    over = true;
    clearTimeout(timer);
    clearTimeout(probing);
    socket.onopen = socket.onmessage = socket.onerror = socket.onclose = () => {};
    socket.close(code);
    lost(error);
    for (const done of replies.values()) done(error);
  }

  function watch() {
    clearTimeout(timer);
    const owed = replies.size > 0;
    const due = owed ? Math.max(heard, asked) + PATIENCE : heard + welcome.ping_interval;
    const left = due - performance.now();
    if (left > 0) timer = later(left, watch);
    else if (owed) end(disconnected("no answer came in time"));
    else call("ping", {}, () => {});
  }

  /** `done(error, ack)` is called once, before anything that follows the reply is looked at.
   *  `body` is JSON already: what is repeated must be what was sent first. */
  function call(type, fields, done, body) {
    const id = next++;
    let text = JSON.stringify({ type, id, ...fields });
    if (body !== undefined) text = `${text.slice(0, -1)},"body":${body}}`;
    if (isLonger(text, welcome.limits.frame_bytes)) {
      // Sent, it would end the connection instead of being answered.
      done(new CommandError("too_large", "The command is larger than limits.frame_bytes."));
      return;
    }
    if (replies.size === 0) asked = performance.now();
    replies.set(id, done);
    socket.send(text);
    watch();
  }

  function settle(frame) {
    const done = replies.get(frame.id);
    if (done === undefined) return;
    // Replies come in the order of the commands: one that was passed over will never come.
    if (replies.keys().next().value !== frame.id) return end(disconnected("a reply is missing"));
    replies.delete(frame.id);
    asked = heard;
    watch();
    if (frame.type === "ack") done(undefined, frame);
    else done(new CommandError(frame.code, frame.message, frame));
  }

  function receive(frame) {
    if (frame.type === "bye") {
      end(new DisconnectedError(frame.code, frame.reason, frame.after));
    } else if (welcome === undefined) {
      if (frame.type !== "welcome" || !(frame.ping_interval > 0)) throw new TypeError("no welcome");
      welcome = frame;
      opened(frame);
      if (!over) watch();
    } else if (frame.type === "ack" || frame.type === "error") {
      settle(frame);
    } else {
      received(frame);
    }
  }

  socket.onopen = () => {
    upgraded = true;
  };
  socket.onmessage = ({ data }) => {
    heard = performance.now();
    try {
      receive(JSON.parse(data));
    } catch (cause) {
      const reason = "the server sent what is not version 1 of the protocol";
      end(Object.assign(new DisconnectedError(1002, reason), { cause }));
    }
  };
  socket.onclose = ({ code, reason }) => {
    if (upgraded) end(new DisconnectedError(code === 1005 ? 1006 : code, reason));
    else refused();
  };
  // Not every implementation lets a close follow.
  socket.onerror = () => {
    if (!upgraded) refused();
  };

  /** The handshake failed, and a browser does not say why. */
  async function refused() {
    socket.onerror = socket.onclose = () => {};
    end(await whyRefused(url, token, fetch));
  }

  return {
    call,
    close: () => end(new DisconnectedError(1000, "closed by this client"), 1000),
    /** Ask whether anybody is there, because something has happened to the network. */
    probe() {
      const before = heard;
      call("ping", {}, () => {});
      probing ??= later(PROBE, () => {
        probing = undefined;
        if (heard === before) end(disconnected("no answer to a probe"));
      });
    },
  };
}

async function whyRefused(url, token, fetch) {
  const failed = (reason) => new DisconnectedError(1006, reason);
  try {
    return await within(PATIENCE, async (signal) => {
      const headers = { Authorization: `Bearer ${token}` };
      const answer = await fetch(overHttp(url), { ...PRIVATELY, headers, signal });
      return answer.status === 426 ? failed("the handshake failed") : refusal(answer);
    });
  } catch {
    return failed("the server cannot be reached");
  }
}

// --- a room ------------------------------------------------------------------------------------

/**
 * One joined room: the protocol's rules of positions, and a bounded queue of events to be taken.
 *
 * `phase` is "out" (not joined on this link), "asked" (a join is under way: what comes before its
 * ack is part of the hole, or of its replay), "live", "full" (nobody takes the events: they are let
 * go until the queue is empty, and then asked for again) or "ended". `enter` asks for a join.
 * What it returns is for the client; `room` of it is what applications get.
 */
function openRoom(name, { since, last }, bound, enter, commands) {
  const queue = [];
  const readers = [];
  let reached = since;
  let failure;

  const room = {
    name,
    rights: "",
    head: since,
    position: since,
    recovered: true,
    get joined() {
      return inner.phase === "live";
    },
    send: (body, options) => commands.send(name, body, options),
    history: (options) => commands.history(name, options),
    leave: async () => inner.phase === "ended" ? undefined : commands.leave(name),
    [Symbol.asyncIterator]: events,
  };

  const inner = {
    name,
    room,
    phase: "out",
    admitted: false,
    command: undefined,

    /** The fields of the join that goes on from where it is. */
    asking() {
      inner.phase = "asked";
      const fresh = !inner.admitted && last !== undefined;
      return { room: name, ...(reached && { since: reached }), ...(fresh && { last }) };
    },

    admit(ack) {
      const end = readPosition(ack);
      const start = readPosition({ epoch: end.epoch, offset: end.offset - ack.replay });
      if (!inner.admitted) room.position = start;
      [room.rights, room.head, room.recovered] = [ack.rights, end, ack.recovered !== false];
      reached = start;
      [inner.phase, inner.admitted] = ["live", true];
      // Whatever the bound: what was lost must not be forgotten as well.
      if (!room.recovered) push(start, gap(start, ack.gap));
    },

    receive(frame) {
      if (frame.type === "left") {
        inner.end({ type: "left", room: name, reason: frame.reason });
      } else if (inner.phase !== "live") {
        return;
      } else if (frame.type === "epoch") {
        put(readPosition({ epoch: frame.epoch, offset: reached.offset }));
      } else if (frame.type === "reset") {
        const where = readPosition(frame);
        put(where, gap(where));
      } else if (Number.isSafeInteger(frame.offset)) {
        move(frame);
      }
    },

    /** The link is gone. A full room stays full: it is joined again once somebody takes events. */
    lose() {
      if (inner.phase === "asked" || inner.phase === "live") inner.phase = "out";
    },

    /** The iteration ends after the events that wait: with `left`, an error, or just so. */
    end(left, error) {
      if (inner.phase === "ended") return;
      inner.phase = "ended";
      failure = error;
      push(reached, left);
    },
  };

  function move(frame) {
    if (frame.offset <= reached.offset) return;
    const where = { epoch: reached.epoch, offset: frame.offset };
    if (frame.offset === reached.offset + 1) {
      put(where, frame.type === "message" ? readMessage(frame, where) : undefined);
    } else if (queue.length < bound) {
      enter(inner);
    } else {
      inner.phase = "full";
    }
  }

  /** Move to `where`, if there is space for it. */
  function put(where, event) {
    if (queue.length < bound) {
      reached = where;
      push(where, event);
    } else {
      inner.phase = "full";
    }
  }

  function push(where, event) {
    queue.push({ where, event });
    for (const resolve of readers.splice(0)) resolve();
  }

  const gap = (position, missed) => (
    { type: "gap", room: name, position, first: missed?.from, last: missed?.to }
  );

  async function* events() {
    for (;;) {
      while (queue.length > 0) {
        const { where, event } = queue.shift();
        room.position = where;
        if (event !== undefined) yield event;
      }
      if (inner.phase === "ended") {
        if (failure !== undefined) throw failure;
        return;
      }
      if (inner.phase === "full") enter(inner);
      await new Promise((resolve) => readers.push(resolve));
    }
  }

  return inner;
}

function readPosition({ epoch, offset }) {
  if (typeof epoch !== "string" || !Number.isSafeInteger(offset)) throw new TypeError("position");
  return { epoch, offset };
}

function readMessage({ room, ts, user, body, key }, position) {
  return { type: "message", room, position, ts, user, body, key };
}

function readHistory(ack) {
  const { events } = ack;
  return {
    position: readPosition(ack),
    messages: events
      .filter((event) => event.type === "message")
      .map((event) => readMessage(event, { epoch: ack.epoch, offset: event.offset })),
    first: events[0]?.offset,
    last: events.at(-1)?.offset,
    more: ack.more,
  };
}

// --- a client ----------------------------------------------------------------------------------

/**
 * Connect to `url` (`wss://…/v1/ws`) and stay connected until `close()`, or until coming back is of
 * no use. Returns at once; commands wait for the connection. chat.d.ts tells of every part.
 */
export function connect(url, options) {
  const { token, deadline = DEADLINE, queue = QUEUE, outbox = OUTBOX } = options;
  const { backoff: [first, longest] = BACKOFF } = options;
  const { WebSocket = globalThis.WebSocket, fetch = globalThis.fetch } = options;
  const address = overWebSocket(url);
  const source = typeof token === "function" ? token : undefined;
  if (source === undefined) checkToken(token);
  // Without any space a room would be joined again and again.
  if (!(queue >= 1)) throw new TypeError("A queue has space for one event at least.");
  if (WebSocket === undefined) {
    throw new TypeError(
      "There is no WebSocket here: pass one, or start Node.js 20 with --experimental-websocket.",
    );
  }

  const rooms = new Map();
  /** Sends by room, oldest first. */
  const outboxes = new Map();
  /** Those that are not answered for good. */
  const commands = new Set();
  const watchers = new Set();
  let waiting = 0;
  let over;
  let line; // The link, from the beginning of its handshake,
  let link; // and from its welcome on.
  let nap;
  let skew = 0;
  let current = source === undefined ? token : undefined;
  let used; // The token that the link goes by, of which expires_at speaks.
  let stale = false;
  let refused; // Why the server takes the current token no longer; it is never shown again.
  let strikes = 0;
  let attempt = 0;
  let faults = 0;
  let leaving = false;

  const now = () => Date.now() + skew;

  function become(next) {
    client.state = next;
    for (const watcher of watchers) queueMicrotask(() => watchers.has(watcher) && watcher(next));
  }

  // Connecting, and coming back.

  async function run() {
    while (over === undefined) {
      become({ name: "connecting" });
      const { why, lasted } = await attend();
      if (over !== undefined) return;
      const wait = judge(why, lasted);
      if (wait === undefined) return finish(why);
      become({ name: "waiting", until: Date.now() + wait.ms, why });
      nap = doze(wait.ms);
      nap.told = wait.told;
      await nap.over;
    }
  }

  /** One connection, from the token to the end. */
  async function attend() {
    try {
      const spent = stale || (current === used && client.expires_at - now() < SPENT);
      if (source !== undefined && (current === undefined || spent)) await replace();
      if (over !== undefined) return {};
    } catch (why) {
      return { why, lasted: 0 };
    }
    let began;
    const why = await new Promise((resolve) => {
      const opened = (frame) => {
        began = performance.now();
        open(frame);
      };
      const lost = (error) => {
        line = link = undefined;
        for (const room of rooms.values()) room.lose();
        resolve(error);
      };
      line = openLink({ url: address, token: current, WebSocket, fetch, opened, received, lost });
    });
    return { why, lasted: began === undefined ? 0 : performance.now() - began };
  }

  /** Get another token than the current one, if there is need of one to connect with. */
  async function replace() {
    const [why, before] = [refused, current];
    await obtain();
    if (why !== undefined && current === before) finish(why);
    refused = undefined;
  }

  function open(frame) {
    if (client.welcome !== undefined && client.welcome.user !== frame.user) {
      // Positions and keys are one user's own.
      finish(new CommandError("identity_mismatch", "The new token is another user's."));
      return;
    }
    client.welcome = frame;
    skew = frame.ts - Date.now();
    [used, client.expires_at, strikes] = [current, frame.expires_at, 0];
    link = line;
    become({ name: "open", connection: frame.connection });
    for (const room of rooms.values()) if (room.phase === "out") enter(room);
    for (const command of commands) command.go();
  }

  /** How long to wait before coming back, and whether the server said so; undefined is never. */
  function judge(error, lasted) {
    if (lasted >= STEADY) attempt = faults = 0;
    if (error.final) return undefined;
    const { status, code } = error;
    if (status === 401 || code === 4401) {
      // Unless a newer one is at hand already.
      if (status === 401 || current === used) [stale, refused] = [true, error];
      if (status === 401 && code !== "token_expired") strikes += 1;
      if (source === undefined || strikes === STRIKES) return undefined;
    }
    if (OWN_FAULTS.includes(code) && ++faults === OWN_FAULT_TRIES) return undefined;
    const wait = jitter(attempt++, first, longest);
    if (error.after !== undefined) return { ms: error.after, told: true };
    // A crowd that was told the same second is to be spread over more than that.
    if (error.retry_after !== undefined) return { ms: error.retry_after + wait, told: true };
    return { ms: wait, told: false };
  }

  /** The network may be another one now: see whether the link is alive, or do without the wait.
   *  What the server asked for is waited all the same. */
  function wake() {
    if (link !== undefined) link.probe();
    else if (nap?.told === false) nap.end();
  }

  function finish(error, quiet = false) {
    if (over !== undefined) return;
    over = error;
    const told = quiet || (leaving && error.code === 4503) ? undefined : error;
    ignoreNetwork();
    line?.close();
    nap?.end();
    for (const room of rooms.values()) {
      room.command?.cancel();
      room.end(undefined, told);
      room.settle(error);
    }
    rooms.clear();
    for (const posts of outboxes.values()) {
      for (const post of posts.splice(1)) post.settle(error);
    }
    for (const command of commands) command.end(error);
    become({ name: "closed", why: told });
  }

  // Tokens.

  let obtaining;
  function obtain(rightsChanged = false) {
    obtaining ??= within(PATIENCE, async () => {
      current = checkToken(await source({ stale: current, now: rightsChanged }));
      stale = false;
      return current;
    })
      .catch((error) => {
        if (error instanceof TokenRefusedError) finish(error);
        throw error;
      })
      .finally(() => {
        obtaining = undefined;
      });
    return obtaining;
  }

  /** Refresh until it works, or the link ends; one such loop at a time. */
  let renewing;
  let rightsChanged = false;
  function renew() {
    renewing ??= (async (on) => {
      let fresh;
      for (let tries = 0; ; tries++) {
        try {
          if (rightsChanged || fresh === undefined) {
            const again = rightsChanged;
            // One that is being fetched already may be older than the change.
            if (again) await obtaining?.catch(() => {});
            rightsChanged = false;
            fresh = await obtain(again);
          }
          const refreshed = await put(on, fresh);
          if (!rightsChanged) return refreshed;
        } catch (error) {
          if (on === undefined || on !== link) throw error;
          if (error instanceof CommandError && !error.temporary) fresh = undefined;
          await doze(error.retry_after ?? jitter(tries, first, LONGEST_AGAIN)).over;
          if (on !== link) throw error;
        }
      }
    })(link).finally(() => {
      renewing = undefined;
    });
    return renewing;
  }

  /** Put a token in the place of the link's own. */
  function put(on, fresh) {
    return new Promise((resolve, reject) => {
      if (on === undefined || on !== link) {
        reject(over ?? new DisconnectedError(1006, "not connected"));
        return;
      }
      on.call("refresh", { token: fresh }, (error, ack) => {
        if (error !== undefined) return reject(error);
        const { expires_at, roles, left } = ack;
        client.expires_at = expires_at;
        [current, used, stale] = [fresh, fresh, false];
        for (const name of left) drop(name, { type: "left", room: name, reason: "forbidden" });
        resolve({ expires_at, roles, left });
      });
    });
  }

  // What comes.

  function received(frame) {
    if (frame.type === "expiring") {
      if (source === undefined) return;
      stale = true;
      rightsChanged ||= frame.now === true;
      renew().catch(() => {}); // The end of the link says why.
      return;
    }
    const room = rooms.get(frame.room);
    if (room === undefined) return;
    room.receive(frame);
    if (room.phase === "ended") drop(frame.room);
  }

  function enter(room) {
    const settle = (error) => {
      room.command = undefined;
      if (error === undefined) room.settle();
      else if (!room.admitted) drop(room.name, undefined, error);
      else drop(room.name, { type: "left", room: room.name, reason: error.code });
    };
    room.command ??= repeat("join", room.asking, settle, { read: room.admit });
    room.command.go();
  }

  /** Forget a room; its iteration ends, and if it was not yet joined its join fails. */
  function drop(name, left, error) {
    const room = rooms.get(name);
    if (room === undefined) return;
    rooms.delete(name);
    room.command?.cancel();
    room.end(left, error);
    room.settle(error ?? new ChatError(`${name} was left, or joined again, before it was joined`));
  }

  // Commands.

  /** A command that is repeated, on this link or the next, until it is answered for good. Then, if
   *  it is not cancelled, `settle(error, value)` is called, with what `read` makes of the ack.
   *  `given` tells of an error for which it must not be repeated any more. */
  function repeat(type, fields, settle, { body, read = () => {}, given = () => undefined } = {}) {
    let tries = 0;
    let timer;
    const command = {
      /** Its answer is awaited. */
      out: false,
      /** It may have taken effect. */
      doubtful: false,
      go() {
        if (link === undefined || command.out || !commands.has(command)) return;
        clearTimeout(timer);
        const error = given();
        if (error !== undefined) return command.end(error);
        command.out = true;
        link.call(type, fields(), answered, body);
      },
      end(error, value) {
        command.cancel();
        settle(error, value);
      },
      cancel() {
        clearTimeout(timer);
        commands.delete(command);
      },
    };
    function answered(error, ack) {
      command.out = false;
      if (!commands.has(command)) return;
      if (error === undefined) {
        command.end(undefined, read(ack));
        return;
      }
      const lost = error instanceof DisconnectedError;
      command.doubtful ||= lost || error.doubtful;
      const late = given();
      if (late !== undefined) command.end(late);
      else if (!lost && !error.temporary) command.end(error);
      else if (!lost) {
        const wait = error.retry_after ?? jitter(tries++, first, LONGEST_AGAIN);
        timer = later(wait, command.go);
      }
    }
    commands.add(command);
    return command;
  }

  /** Count one more that waits, or say why it cannot. */
  function admit() {
    if (over !== undefined) throw over;
    if (waiting >= outbox) throw new OverflowError(`${outbox} commands wait for their answer`);
    waiting += 1;
  }

  async function ask(type, fields, read) {
    admit();
    let command;
    try {
      return await within(deadline, () => new Promise((resolve, reject) => {
        command = repeat(type, () => fields, either(resolve, reject), { read });
        command.go();
      }));
    } finally {
      waiting -= 1;
      command.cancel();
    }
  }

  /** One message of a room is under way at a time: what is sent first stands first, whatever is
   *  refused, lost or repeated. */
  async function send(name, body, { key = uuid(), echo = true } = {}) {
    const text = JSON.stringify(body);
    if (text === undefined) throw new TypeError("A body is a JSON value.");
    admit();
    const posts = outboxes.get(name) ?? [];
    outboxes.set(name, posts);
    let age;
    let timer;
    try {
      return await new Promise((resolve, reject) => {
        const post = { settle: either(resolve, reject), command: undefined };
        // The server counts from when it stored it and this client from before that, but what is
        // repeated has to arrive in time, too.
        const late = () => {
          const window = client.welcome.limits.key_window;
          const forgotten = age?.() > window - Math.min(PATIENCE, window / 10);
          return forgotten && post.command.doubtful ? new UnknownOutcomeError(key) : undefined;
        };
        const fields = () => {
          age ??= stopwatch();
          timer ??= later(client.welcome.limits.key_window, () => {
            const error = late();
            if (error !== undefined && !post.command.out) post.command.end(error);
          });
          return { room: name, key, ...(echo ? {} : { echo }) };
        };
        const settle = (error, position) => {
          const unknown = post.command.doubtful && !(error instanceof UnknownOutcomeError);
          posts.shift();
          post.settle(error && unknown ? new UnknownOutcomeError(key, error) : error, position);
          if (posts.length > 0) posts[0].begin();
          else outboxes.delete(name);
        };
        post.begin = () => {
          const more = { body: text, given: late, read: readPosition };
          post.command = repeat("send", fields, settle, more);
          post.command.go();
        };
        posts.push(post);
        if (posts.length === 1) post.begin();
      });
    } finally {
      clearTimeout(timer);
      waiting -= 1;
    }
  }

  async function leave(name) {
    drop(name);
    if (link === undefined) return; // In no room then, and this one will not be joined again.
    await new Promise((resolve, reject) => {
      link.call("leave", { room: name }, (error) => {
        if (error instanceof CommandError) reject(error);
        else resolve();
      });
    });
  }

  function history(name, { before, after, limit = 50 } = {}) {
    return ask("history", { room: name, before, after, limit }, readHistory);
  }

  const client = {
    state: { name: "connecting" },
    welcome: undefined,
    expires_at: undefined,
    now,
    async opened() {
      let stop;
      while (link === undefined) {
        if (over !== undefined) throw over;
        await new Promise((changed) => {
          stop = client.watch(changed);
        }).finally(() => stop());
      }
    },
    watch(watcher) {
      watchers.add(watcher);
      return () => watchers.delete(watcher);
    },
    async join(name, where = {}) {
      if (over !== undefined) throw over;
      drop(name);
      const room = openRoom(name, where, queue, enter, { send, history, leave });
      try {
        return await within(deadline, () => new Promise((resolve, reject) => {
          room.settle = either(() => resolve(room.room), reject);
          rooms.set(name, room);
          enter(room);
        }));
      } catch (error) {
        // Nobody waits any more, and the server may have let it in all the same.
        if (rooms.get(name) === room) leave(name).catch(() => {});
        throw error;
      }
    },
    leave,
    send,
    history,
    async refresh(fresh) {
      if (fresh !== undefined) checkToken(fresh);
      else if (source === undefined) throw new TypeError("Which token? There is no function.");
      return within(deadline, async (signal) => {
        for (let tries = 0; ; ) {
          await client.opened();
          try {
            return await (fresh === undefined ? renew() : put(link, fresh));
          } catch (error) {
            const lost = error instanceof DisconnectedError && over === undefined;
            if (signal.aborted || !(lost || error.temporary)) throw error;
            if (!lost) await doze(error.retry_after ?? jitter(tries++, first, LONGEST_AGAIN)).over;
          }
        }
      });
    },
    async logout() {
      leaving = true; // The end that follows is no surprise.
      try {
        await ask("logout", {});
      } catch (error) {
        leaving = false;
        if (error.code !== 4503) throw error;
      }
      finish(new DisconnectedError(4503, "session_revoked"), true);
    },
    ping: () => ask("ping", {}, (ack) => ack.ts),
    wake,
    close: () => finish(new DisconnectedError(1000, "closed by this client"), true),
  };

  const ignoreNetwork = followNetwork(wake);
  run().catch(finish);
  return client;
}

/** Call `changed` when the network is back, or somebody looks at the page again. */
function followNetwork(changed) {
  const page = globalThis.document;
  const seen = () => page.visibilityState === "visible" && changed();
  globalThis.addEventListener?.("online", changed);
  page?.addEventListener?.("visibilitychange", seen);
  return () => {
    globalThis.removeEventListener?.("online", changed);
    page?.removeEventListener?.("visibilitychange", seen);
  };
}

// --- a token keeper ----------------------------------------------------------------------------

/** Short enough to ask twice in the 10 s in which the server gives a lost answer again. */
const TRADE_PATIENCE = 4_000;
const TRADE_TRIES = 4;
const TRADE_BACKOFF = [250, 4_000];
/** An access token that ends sooner is traded before it is used. */
const LEFT_OVER = 30_000;

/**
 * Keep a pair of tokens fresh: `connect(url, { token: tokenKeeper(url, pair, { save }) })`.
 *
 * A refresh token is good for one trade. So the new pair is saved before it is used, and an answer
 * that was lost is asked for again with the same token. A refusal for good is never repeated: every
 * later call rejects with the same `TokenRefusedError`, and the user has to log in again.
 *
 * Where tabs share a pair, `load` reads what another has saved, and `navigator.locks` lets one of
 * them trade at a time. Without `load`, give each tab a session of its own.
 */
export function tokenKeeper(url, pair, options = {}) {
  const { save = () => {}, load, fetch = globalThis.fetch } = options;
  const { locks = globalThis.navigator?.locks } = options;
  const target = overHttp(overWebSocket(url)).replace(/\/ws$/, "/tokens/refresh");
  let unsaved;
  let flight;
  let dead;
  let hold = 0;

  async function trade() {
    for (let tries = 1; ; tries++) {
      await doze(hold - Date.now()).over;
      const answer = await post();
      if (!(answer instanceof ChatError)) return answer;
      if (answer instanceof TokenRefusedError) dead = answer;
      if (answer.final) throw answer;
      hold = Date.now() + (answer.retry_after ?? jitter(tries, ...TRADE_BACKOFF));
      if (tries === TRADE_TRIES) throw answer;
    }
  }

  async function post() {
    const headers = { Authorization: `Bearer ${pair.refresh_token}` };
    const request = { ...PRIVATELY, method: "POST", headers };
    try {
      return await within(TRADE_PATIENCE, async (signal) => {
        const answer = await fetch(target, { ...request, signal });
        if (answer.status === 200) return readPair(await answer.json());
        return refusal(answer, answer.status === 401 ? TokenRefusedError : RefusedError);
      });
    } catch {
      return new DisconnectedError(1006, "no answer to a refresh token");
    }
  }

  async function renewed({ stale, now }) {
    if (unsaved === undefined) {
      pair = (await load?.()) ?? pair;
      const left = pair.expires_at - Date.now();
      if (!now && pair.access_token !== stale && left > LEFT_OVER) return pair.access_token;
      unsaved = await trade();
    }
    await save(unsaved);
    [pair, unsaved] = [unsaved, undefined];
    return pair.access_token;
  }

  /** The access token, or a newer one if it is `stale` or about to be, or if `now` one is needed
   *  because the session's rights have changed. */
  async function keeper(wanted = {}) {
    // A trade that is under way may have begun before the change.
    while (wanted.now && flight !== undefined) await flight.catch(() => {});
    if (dead !== undefined) throw dead;
    flight ??= alone(() => renewed(wanted)).finally(() => {
      flight = undefined;
    });
    return flight;
  }

  async function alone(work) {
    return locks === undefined ? work() : locks.request(`chatserver ${pair.session}`, work);
  }

  return Object.defineProperty(keeper, "pair", { get: () => pair });
}

function readPair(answer) {
  const { access_token, refresh_token } = answer;
  if (typeof access_token !== "string" || typeof refresh_token !== "string") throw new TypeError();
  return answer;
}

// --- small parts -------------------------------------------------------------------------------

/** Anywhere up to a limit that doubles each time, so that a crowd does not come back as one. */
const jitter = (attempt, first, longest) =>
  Math.random() * Math.min(longest, first * 2 ** attempt);

const either = (resolve, reject) => (error, value) =>
  error === undefined ? resolve(value) : reject(error);

/** A timer's milliseconds have 31 bits: without this, what is further away would be at once. */
const later = (ms, work) => setTimeout(work, Math.min(ms, 2 ** 31 - 1));

/** A wait that can be ended early. */
function doze(ms) {
  const nap = {};
  nap.over = new Promise((resolve) => {
    const timer = later(ms, resolve);
    nap.end = () => {
      clearTimeout(timer);
      resolve();
    };
  });
  return nap;
}

async function within(ms, work) {
  const abort = new AbortController();
  let timer;
  const late = new Promise((_, reject) => {
    timer = later(ms, () => {
      reject(new TimeoutError(`no answer in ${ms} ms`));
      abort.abort();
    });
  });
  try {
    return await Promise.race([work(abort.signal), late]);
  } finally {
    clearTimeout(timer);
  }
}

/** How long ago it was made. A clock may be set back, and another may stand still while a laptop
 *  sleeps: the one that says more is believed. */
function stopwatch() {
  const [wall, steady] = [Date.now(), performance.now()];
  return () => Math.max(Date.now() - wall, performance.now() - steady);
}

function isLonger(text, bytes) {
  if (text.length > bytes) return true;
  return text.length * 3 > bytes && encodeURIComponent(text).replace(/%../g, "x").length > bytes;
}

/** Random, as it must be: two devices of one user with the same key would swallow a message. */
function uuid() {
  const crypto = globalThis.crypto;
  if (crypto?.randomUUID) return crypto.randomUUID(); // Not on pages without TLS,
  const bytes = new Uint8Array(16);
  if (crypto?.getRandomValues) crypto.getRandomValues(bytes); // and not in every React Native.
  else bytes.forEach((_, i) => (bytes[i] = Math.random() * 256));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

function checkToken(token) {
  // It travels as the name of a sub-protocol.
  if (typeof token === "string" && /^[\w.~-]+$/.test(token)) return token;
  throw new TypeError("A token is a string of letters, digits, dots, dashes and underscores.");
}

function overWebSocket(url) {
  const address = String(url).replace(/^http/, "ws");
  if (/^wss?:\/\/[^?#]+$/.test(address)) return address;
  throw new TypeError("The URL of a chat server looks like wss://chat.example/v1/ws");
}

const overHttp = (address) => address.replace(/^ws/, "http");
