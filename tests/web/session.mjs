// One session's life with a real server: argv has the URL and the pair of a login. Prints one line
// of JSON for each thing that a test looks at.

import { TokenRefusedError, connect, tokenKeeper } from "../../chatserver/web/chat.js";

const [url, login] = process.argv.slice(2);
const print = (what) => console.log(JSON.stringify(what));

const saved = [];
const first = JSON.parse(login);
const keeper = tokenKeeper(url, first, { save: async (pair) => saved.push(pair) });
const client = connect(url, { token: keeper });
const room = await client.join("general");
const before = client.expires_at;
const refreshed = await client.refresh();
print({ refreshed: refreshed.expires_at >= before, same: keeper.pair === saved[0] });

const position = await room.send({ text: "hello" }, { key: "k" });
for await (const event of room) {
  print({ event: event.type, user: event.user, key: event.key, offset: event.position.offset });
  break;
}
print({ sent: position.offset, end: (await room.history()).position.offset });

const ended = (async () => {
  for await (const _ of room);
})();
await client.logout();
await ended;
print({ state: client.state.name, why: client.state.why ?? null });
await keeper({ now: true }).catch((error) => {
  print({ refused: error instanceof TokenRefusedError, code: error.code });
});
const late = connect(url, { token: first.access_token });
await late.opened().catch((error) => print({ status: error.status, code: error.code }));
