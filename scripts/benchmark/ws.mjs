// Node's ws: `node ws.mjs LISTENING_FD REPORT_FD`. What a client sends goes to everyone, as it is.
import { writeSync } from "node:fs";
import { createServer } from "node:http";
import { WebSocketServer } from "ws";

const [listening, report] = process.argv.slice(2).map(Number);
const http = createServer();
const server = new WebSocketServer({ server: http, perMessageDeflate: false });
server.on("connection", (socket) => {
  socket.on("message", (message, binary) => {
    // A set, for it keeps its order: the publisher comes last and is served last.
    for (const client of server.clients) client.send(message, { binary });
  });
});
http.listen({ fd: listening }, () => writeSync(report, "\n"));
