// Socket.IO: `node socketio.mjs LISTENING_FD REPORT_FD`. What a client emits goes to everyone, in
// this process alone (no adapter for several), over WebSocket from the start.
import { writeSync } from "node:fs";
import { createServer } from "node:http";
import { Server } from "socket.io";

const [listening, report] = process.argv.slice(2).map(Number);
const http = createServer();
const io = new Server(http, {
  transports: ["websocket"],
  perMessageDeflate: false,
  pingInterval: 3_600_000,
  serveClient: false,
});
io.on("connection", (socket) => {
  socket.on("message", (body) => io.emit("message", body));
});
http.listen({ fd: listening }, () => writeSync(report, "\n"));
