/**
 * The page that a development server shows at "/": all that an application does with chat.js, in
 * the order in which it happens. Whatever others wrote becomes text, never markup.
 */

import { connect, tokenKeeper } from "./chat.js";

const SOCKET = new URL("/v1/ws", location.href);
/** So many more messages are shown each time that one scrolls to the first. */
const PAGE = 50;
/** So close to each other, messages of one person stand together. */
const TOGETHER = 5 * 60_000;

/** By the code of an error, or else its name: what to say of it. */
const WORDS = {
  1001: "The server is going away.",
  1006: "The server cannot be reached.",
  1012: "The server is restarting.",
  1013: "The server is busy.",
  4401: "The token has expired.",
  4408: "The connection was silent for too long.",
  4429: "This page asked for too much at once.",
  4430: "This page could not keep up.",
  4500: "The server could not read what this page sent. Load the page again.",
  4503: "This session was ended. Sign in again.",
  4505: "This user has too many connections, and this one had to go. Sign in again.",
  draining: "The server is restarting.",
  forbidden: "You may not do that in this room.",
  invalid: "A room's name has letters, digits and . _ : @ + - and begins with a letter or digit.",
  rate_limited: "That was too much at once. Wait a moment.",
  room_limit: "You are in as many rooms as one can be in. Leave one first.",
  token_expired: "This session is over. Sign in again.",
  token_invalid: "This session is over. Sign in again.",
  token_revoked: "This session was ended. Sign in again.",
  too_large: "This message is too long.",
  unavailable: "The server cannot store anything right now.",
  OverflowError: "Too many messages are waiting to be sent.",
  TimeoutError: "The server did not answer.",
  UnknownOutcomeError: "No answer came: it may have been sent.",
};
const inWords = (error) => WORDS[error.code] ?? WORDS[error.name] ?? error.message;

const at = (id) => document.getElementById(id);
const log = at("log");

/** Half a character, which a script or a paste can leave there, would be refused by the server. */
const typed = (id) => at(id).value.toWellFormed();

/** The second click of a double one is not meant for the button that is there by then. */
function ignoreSecondClick(click) {
  if (click.detail < 2 || !click.target.closest("button")) return;
  click.preventDefault();
  click.stopPropagation();
}
addEventListener("click", ignoreSecondClick, { capture: true });

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// --- who is here -------------------------------------------------------------------------------

/** This window's own, `{ session, user, rooms }`: it outlives a reload. */
let me = JSON.parse(sessionStorage.getItem("me"));
let client;
let keeper;

/** A session's tokens. All windows see them, for a duplicated one shares its session. */
const tokens = {
  load: (session) => JSON.parse(localStorage.getItem(`tokens ${session}`)),
  save: (pair) => localStorage.setItem(`tokens ${pair.session}`, JSON.stringify(pair)),
  forget: (session) => localStorage.removeItem(`tokens ${session}`),
  /** Of windows that were closed. */
  sweep() {
    for (const name of Object.keys(localStorage).filter((name) => name.startsWith("tokens "))) {
      const { refresh_expires_at } = JSON.parse(localStorage.getItem(name));
      if (refresh_expires_at < Date.now()) localStorage.removeItem(name);
    }
  },
};

at("login").onsubmit = async (submitted) => {
  submitted.preventDefault();
  const user = typed("name");
  const button = at("login").querySelector("button");
  at("refusal").textContent = "";
  button.disabled = true; // A second click would begin a second session.
  try {
    // Development's own way in. An application asks its backend, which knows who is logged in.
    const query = new URLSearchParams({ user });
    const answer = await fetch(`/dev/sessions?${query}`, { method: "POST" });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error.message);
    tokens.sweep();
    tokens.save(body);
    remember({ session: body.session, user, rooms: [] });
    enter();
  } catch (error) {
    at("refusal").textContent = error instanceof TypeError ? WORDS[1006] : error.message;
    at("name").focus();
  } finally {
    button.disabled = false;
  }
};

function remember(changed) {
  me = changed;
  sessionStorage.setItem("me", JSON.stringify(me));
}

function enter() {
  const pair = tokens.load(me.session);
  keeper = tokenKeeper(SOCKET, pair, { save: tokens.save, load: () => tokens.load(me.session) });
  client = connect(SOCKET, { token: keeper });
  client.watch(showState);
  showState(client.state);
  at("me").textContent = me.user;
  at("door").hidden = true;
  at("chat").hidden = false;
  for (const name of me.rooms) join(name);
  if (named(location.hash) === undefined) go(me.rooms[0] ?? "general");
  else select();
  at("text").focus();
}

/** Forget the session, and show the door. */
function exit() {
  if (me !== null) tokens.forget(me.session);
  me = null;
  sessionStorage.removeItem("me");
  rooms.clear();
  current = undefined;
  at("rooms").replaceChildren();
  log.replaceChildren();
  notice();
  document.title = "chatserver";
  at("chat").hidden = true;
  at("door").hidden = false;
  at("name").select();
}

at("logout").onclick = () => client.logout().catch(complain);

/** What a backend does to a stolen session; the server then closes its connections. */
at("revoke").onclick = async () => {
  const headers = { Authorization: `Bearer ${keeper.pair.refresh_token}` };
  try {
    const answer = await fetch("/v1/tokens/revoke", { method: "POST", headers });
    if (!answer.ok) notice((await answer.json()).error.message);
  } catch {
    notice(WORDS[1006]);
  }
};

at("refresh").onclick = () => client.refresh().catch(complain);
at("retry").onclick = () => client.wake();

/** Beside this one, for somebody else. */
at("second").onclick = (click) => {
  click.preventDefault();
  const [width, height] = [Math.min(window.outerWidth, 720), window.outerHeight];
  const left = window.screenX + window.outerWidth;
  const place = `width=${width},height=${height},left=${left},top=${window.screenY}`;
  window.open(at("second").href, "_blank", `popup,noopener,${place}`);
};

// --- the connection ----------------------------------------------------------------------------

function showState({ name, why }) {
  document.body.dataset.state = name;
  at("state").textContent = {
    connecting: "Connecting …",
    open: "Connected",
    waiting: why && inWords(why),
    closed: "Disconnected",
  }[name];
  const closed = name === "closed";
  const controls = at("chat").querySelectorAll("button, input, textarea");
  for (const control of controls) control.disabled = closed;
  at("refresh").disabled = name !== "open";
  at("refresh").hidden = name === "waiting";
  at("retry").hidden = name !== "waiting";
  showClock();
  if (!closed) return;
  if (why === undefined) exit();
  else {
    const button = element("button", { type: "button", onclick: exit }, "Sign in again");
    notice(inWords(why), button);
    button.focus();
  }
}

function showClock() {
  const { name, until } = client.state;
  const seconds = (ms) => Math.max(0, Math.ceil(ms / 1000));
  let text = "";
  if (name === "open") {
    const left = seconds(client.expires_at - client.now());
    text = `Token good for ${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")}`;
  } else if (name === "waiting") {
    text = `Next try in ${seconds(until - Date.now())} s`;
  }
  at("clock").textContent = text;
}
setInterval(() => client && showClock(), 1000);

function notice(text = "", ...more) {
  at("notice").replaceChildren(text, ...more);
}

/** But not of what the end of the client brings about: that has been said. */
function complain(error, about = "") {
  if (client.state.name !== "closed") notice(about + inWords(error));
}

// --- rooms -------------------------------------------------------------------------------------

/** By name, in the order joined. */
const rooms = new Map();
let current;

/** The room that the address names is the one shown; going to it joins it. */
addEventListener("hashchange", () => me && select());

function go(name) {
  history.replaceState(null, "", name === undefined ? "/" : hashOf(name));
  select();
}

function select() {
  const name = named(location.hash);
  if (name !== undefined && !rooms.has(name)) join(name);
  current = rooms.get(name);
  at("title").textContent = name ?? "No room";
  at("second").href = name === undefined ? "/" : `/${hashOf(name)}`;
  at("leave").hidden = at("compose").hidden = current === undefined;
  for (const view of rooms.values()) view.link.ariaCurrent = view === current ? "page" : null;
  current?.link.scrollIntoView({ block: "nearest", inline: "nearest" });
  quietly(() => log.replaceChildren(...(current ? [current.earlier, current.list] : [])));
  goToEnd();
  showUnread();
}

const hashOf = (name) => `#${encodeURIComponent(name)}`;

function named(hash) {
  try {
    return decodeURIComponent(hash.slice(1)) || undefined;
  } catch {
    return undefined; // Not written by this page.
  }
}

at("join").onsubmit = (submitted) => {
  submitted.preventDefault();
  notice();
  location.hash = hashOf(typed("room"));
  at("room").value = "";
  at("text").focus();
};

at("leave").onclick = () => client.leave(current.name).catch(complain);

async function join(name) {
  const view = openView(name);
  try {
    view.room = await insist(name);
    view.head = view.room.position.offset;
    view.oldest = view.head + 1;
    showEarlier(view);
    for await (const event of view.room) show(view, event);
  } catch (error) {
    complain(error, `${name}: `);
  }
  if (client.state.name === "closed") return; // What was said stays there to be read.
  rooms.delete(name);
  view.tab.remove();
  remember({ ...me, rooms: [...rooms.keys()] });
  if (view === current) go(rooms.has(view.from) ? view.from : me.rooms[0]);
}

/** However long it takes. */
async function insist(name) {
  for (;;) {
    try {
      return await client.join(name);
    } catch (error) {
      if (error.name !== "TimeoutError") throw error;
    }
  }
}

function openView(name) {
  const count = element("span", { className: "unread" });
  const link = element("a", { href: hashOf(name) }, element("span", {}, name), " ", count);
  const earlier = element("button", { type: "button", className: "earlier", hidden: true });
  const view = {
    name,
    /** The room that was shown before, if any. */
    from: current?.name,
    link,
    count,
    earlier,
    tab: element("li", {}, link),
    list: element("ol"),
    /** Undefined until it is joined. */
    room: undefined,
    /** What comes after this offset is new: unread until it is looked at. */
    head: undefined,
    /** What comes before this offset is not shown yet. */
    oldest: undefined,
    loading: false,
    unread: 0,
    /** Of each message shown; offsets alone do not tell, for a log can begin anew. */
    shown: new Set(),
    /** This window's own, by key. */
    sent: new Map(),
  };
  earlier.textContent = "Earlier messages";
  earlier.onclick = () => showEarlier(view);
  at("rooms").append(view.tab);
  rooms.set(name, view);
  remember({ ...me, rooms: [...rooms.keys()] });
  return view;
}

function showUnread() {
  if (current !== undefined && !document.hidden) current.unread = 0;
  let sum = 0;
  for (const { unread, count } of rooms.values()) {
    sum += unread;
    const spoken = element("span", { className: "unseen" }, " unread");
    count.replaceChildren(...(unread ? [String(unread), spoken] : []));
  }
  document.title = `${sum ? `(${sum}) ` : ""}${current?.name ?? "chatserver"}`;
}
document.addEventListener("visibilitychange", () => me && showUnread());

// --- messages ----------------------------------------------------------------------------------

function show(view, event) {
  if (event.type === "left") {
    notice(`You are no longer in ${view.name}.`);
  } else if (event.type === "gap") {
    // What was stored in between does not come by itself any more.
    for (const own of waiting(view)) if (own.dataset.fate === "stored") place(view, own);
    place(view, element("li", { className: "gap" }, "Messages may be missing here"));
    view.head = event.position.offset;
  } else {
    showMessage(view, event);
  }
}

function showMessage(view, message) {
  const { user, position } = message;
  if (view.shown.has(identify(message))) return;
  view.shown.add(identify(message));
  const own = user === me.user ? view.sent.get(message.key) : undefined;
  if (own !== undefined) showFate(own, "stored");
  else if (position.offset > view.head && (view !== current || document.hidden)) view.unread += 1;
  place(view, own ?? makeItem(message));
  showUnread();
}

/** Of a message, in its room. An offset alone does not tell: a log can begin anew. */
const identify = ({ position, ts }) => `${position.offset} ${ts}`;

function makeItem({ user, ts, body }) {
  const text = typeof body?.text === "string" ? body.text : JSON.stringify(body);
  const date = new Date(ts);
  const clock = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const whole = { dateTime: date.toISOString(), title: date.toLocaleString() };
  const time = element("time", whole, clock);
  const item = element(
    "li",
    { className: user === me.user ? "mine" : "" },
    element("p", { className: "head" }, element("b", {}, user), " ", time),
    element("p", { className: "body" }, text),
  );
  Object.assign(item.dataset, { user, ts });
  return item;
}

/** This window's own that are not in the log yet: they stand below it. */
const waiting = (view) => view.list.querySelectorAll(".waiting");

/** Put an item, new or waiting, at the end of the log. */
function place(view, item) {
  const [first] = waiting(view);
  const after = item.nextElementSibling;
  if (item !== first) view.list.insertBefore(item, first ?? null);
  item.classList.remove("waiting");
  for (const each of [item, item.nextElementSibling, after]) group(each);
  stay();
}

/** Name and time are shown once for messages that stand together. */
function group(item) {
  if (item === null) return;
  const before = item.previousElementSibling?.dataset ?? {};
  const close = item.dataset.ts - before.ts < TOGETHER;
  item.classList.toggle("follows", close && before.user === item.dataset.user);
}

/** Whoever looks at the latest message goes on to do so; whoever reads further up is let alone. */
let atEnd = true;
log.onscroll = () => (atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40);
new ResizeObserver(stay).observe(log);

function stay() {
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function goToEnd() {
  atEnd = true;
  stay();
}

/** Change what is shown of the log without having it read out. */
function quietly(change) {
  log.ariaBusy = "true";
  change();
  setTimeout(() => (log.ariaBusy = "false"));
}

/** The button at the beginning is pressed by coming near it. */
const nearStart = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) target.click();
  },
  { root: log, rootMargin: "200px 0px 0px" },
);

async function showEarlier(view) {
  if (view.loading) return;
  view.loading = true;
  try {
    const page = await view.room.history({ before: view.oldest, limit: PAGE });
    const fresh = page.messages.filter((message) => !view.shown.has(identify(message)));
    const below = log.scrollHeight - log.scrollTop;
    quietly(() => view.list.prepend(...fresh.map(makeItem)));
    if (view === current) log.scrollTop = log.scrollHeight - below;
    for (const item of [...view.list.children].slice(0, fresh.length + 1)) group(item);
    for (const message of fresh) view.shown.add(identify(message));
    view.oldest = page.first;
    offerEarlier(view, page.more);
  } catch (error) {
    view.earlier.hidden = false;
    complain(error);
  } finally {
    view.loading = false;
  }
}

function offerEarlier(view, more) {
  if (!more && document.activeElement === view.earlier) log.focus();
  view.earlier.hidden = !more;
  // It may still be in sight, and is told only of changes.
  nearStart.unobserve(view.earlier);
  if (more) nearStart.observe(view.earlier);
}

// --- sending -----------------------------------------------------------------------------------

at("compose").onsubmit = (submitted) => {
  submitted.preventDefault();
  const text = typed("text").trim();
  if (text === "") return;
  notice();
  at("text").value = "";
  post(current, text);
};

at("text").onkeydown = (key) => {
  if (key.key !== "Enter" || key.shiftKey || key.isComposing) return;
  key.preventDefault();
  at("compose").requestSubmit();
};

/** Show it at once. By its key it is known again when it comes back from the server. */
function post(view, text) {
  const key = crypto.randomUUID();
  const item = makeItem({ user: me.user, ts: client.now(), body: { text } });
  item.classList.add("waiting");
  item.append(element("p", { className: "fate" }));
  view.sent.set(key, item);
  view.list.append(item);
  group(item);
  goToEnd();
  deliver(view, item, text, key);
}

async function deliver(view, item, text, key) {
  showFate(item, "sending", "Sending …");
  try {
    await client.send(view.name, { text }, { key });
    showFate(item, "stored");
  } catch (error) {
    const again = () => deliver(view, item, text, key);
    const button = element("button", { type: "button", onclick: again }, "Send again");
    showFate(item, "failed", inWords(error), " ", button);
  }
}

function showFate(item, fate, ...words) {
  item.dataset.fate = fate;
  const stored = element("span", { className: "unseen" }, "stored");
  item.querySelector(".fate").replaceChildren(...(fate === "stored" ? ["✓ ", stored] : words));
}

// --- begin -------------------------------------------------------------------------------------

if (me !== null && tokens.load(me.session) !== null) enter();
else exit();
