// The JavaScript client under scripts/conformance: docs/client-authors.md tells what each line is
// for. On Node.js 20 it needs --experimental-websocket.

import { connect, tokenKeeper } from "../../../chatserver/web/chat.js";

const [url, pair] = process.argv.slice(2);
const saved = new URL("/saved", url.replace("ws", "http"));

async function save({ refresh_token }) {
  await fetch(saved, { method: "POST", headers: { Authorization: `Bearer ${refresh_token}` } });
}

const client = connect(url, { token: tokenKeeper(url, JSON.parse(pair), { save }) });
const tell = (saw) => client.send("general", saw);

async function follow(name) {
  const room = await client.join(name);
  for await (const event of room) {
    const { type, body } = event;
    if (type === "gap") tell({ saw: "gap", first: event.first, last: event.last });
    if (type === "left") tell({ saw: "left", reason: event.reason });
    if (body?.do === "send") {
      room.send({ text: body.text }).catch(() => tell({ saw: "failed", text: body.text }));
    }
    if (body?.do === "join") follow(body.room);
    if (body?.do === "leave") room.leave();
    if (body?.do === "logout") client.logout();
  }
}

// What ends in an error is judged on the wire.
process.on("unhandledRejection", () => {});
await follow("general").catch(() => {});
