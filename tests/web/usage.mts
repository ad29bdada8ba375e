// Compiled, not run: the types let through what is right, and only that.

import {
  type Event, type Pair, type State, connect, RefusedError, tokenKeeper, UnknownOutcomeError,
} from "../../chatserver/web/chat.js";

declare const pair: Pair;

const keeper = tokenKeeper("wss://chat.example/v1/ws", pair, {
  save: async (next) => localStorage.setItem("pair", JSON.stringify(next)),
  load: () => JSON.parse(localStorage.getItem("pair") ?? "null"),
});
const client = connect(new URL("wss://chat.example/v1/ws"), { token: keeper, deadline: 5_000 });
connect("wss://chat.example/v1/ws", { token: async ({ stale, now }) => `${stale} ${now}` });
const stop: () => void = client.watch((state: State) => {
  if (state.name === "waiting") console.log(state.until - Date.now(), state.why.message);
});

const room = await client.join("general", { last: 20, since: { epoch: "e", offset: 1 } });
const { epoch, offset } = await room.send({ text: "hello" }, { echo: false });
const page = await room.history({ before: offset, limit: 10 });
console.log(epoch, page.messages.map((message) => message.body.text), page.more, room.position);

function told(event: Event): string {
  switch (event.type) {
    case "message":
      return `${event.user}: ${event.body.text} ${event.position.offset} ${event.key ?? ""}`;
    case "gap":
      return `${event.first} to ${event.last}`;
    case "left":
      return event.reason;
  }
}
for await (const event of room) told(event);

try {
  await client.logout();
} catch (error) {
  if (error instanceof UnknownOutcomeError) console.log(error.key);
  if (error instanceof RefusedError) console.log(error.status, error.retry_after, error.final);
}
stop();

// @ts-expect-error: a token is needed
connect("wss://chat.example/v1/ws", {});
// @ts-expect-error: positions are not to be changed
room.position.offset = 1;
// @ts-expect-error: there is no such state
if (client.state.name === "offline") client.close();
