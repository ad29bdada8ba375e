/** The chatserver client for browsers, React Native and Node.js. Times are in milliseconds. */

/** A place in a room's log. Offsets compare only within one epoch. */
export interface Position {
  readonly epoch: string;
  readonly offset: number;
}

/** A message of a room. `ts` is the server's, since the Unix epoch. */
export interface Message {
  readonly type: "message";
  readonly room: string;
  readonly position: Position;
  readonly ts: number;
  readonly user: string;
  readonly body: any;
  readonly key?: string;
}

/** Events before `position` may be missing; the next ones follow it. `first` to `last` are the
 *  offsets missed, where the server could tell; the history may still have some of them. */
export interface Gap {
  readonly type: "gap";
  readonly room: string;
  readonly position: Position;
  readonly first?: number;
  readonly last?: number;
}

/** The server ended this user's stay in a room: `forbidden`, `kicked`, `banned` or `closed`, or the
 *  code of the error with which it refused to let the client in again. */
export interface Left {
  readonly type: "left";
  readonly room: string;
  readonly reason: string;
}

export type Event = Message | Gap | Left;

/** A page of a room's log. `first` and `last` are the offsets it spans: go on with `before: first`
 *  or `after: last`. `position` is the end of the log. */
export interface History {
  readonly position: Position;
  readonly messages: readonly Message[];
  readonly first?: number;
  readonly last?: number;
  readonly more: boolean;
}

export interface Refreshed {
  readonly expires_at: number;
  readonly roles: readonly string[];
  /** Rooms that the new token no longer allows. Their iterations end with `Left`. */
  readonly left: readonly string[];
}

/** What the server says first: see docs/protocol.md. */
export interface Welcome {
  readonly protocol: number;
  readonly connection: string;
  readonly session: string;
  readonly user: string;
  readonly roles: readonly string[];
  readonly ts: number;
  readonly expires_at: number;
  readonly ping_interval: number;
  readonly limits: {
    readonly frame_bytes: number;
    readonly rooms: number;
    readonly send_rate: number;
    readonly send_burst: number;
    readonly command_rate: number;
    readonly command_burst: number;
    readonly key_window: number;
    readonly history: number;
    readonly replay: number;
  };
}

/** What a client is doing about its connection, which `connection` is the server's name for. `until`
 *  is when it tries again, by this device's clock. It is closed for good: without `why`, from here. */
export type State =
  | { readonly name: "connecting" }
  | { readonly name: "open"; readonly connection: string }
  | { readonly name: "waiting"; readonly until: number; readonly why: Error }
  | { readonly name: "closed"; readonly why?: Error };

/** What a token function is asked for: another token than `stale`, which is over, or about to be.
 *  `now`: the session's rights have changed, so it must be made now. Most functions fetch a new
 *  token each time and need to look at neither. */
export interface TokenRequest {
  readonly stale?: string;
  readonly now: boolean;
}

/** Whatever it throws, it is asked again later; but a `TokenRefusedError` says that the session is
 *  over, and closes the client. It has 10 seconds. */
export type TokenSource = (request: TokenRequest) => Promise<string> | string;

export interface Options {
  /** An access token, or a function that returns a fresh one, for as long as one likes to stay. */
  token: string | TokenSource;
  /** For one command, whatever number of connections it takes. Default: 30,000. */
  deadline?: number;
  /** The longest wait before the first try to reconnect, and before any. Default: 1,000 and 30,000;
   *  what the server asks for goes before it. */
  backoff?: readonly [first: number, longest: number];
  /** Events that wait in each room to be taken. Past that the newest are let go, and read from the
   *  server's log when the others have been taken. At least 1; default: 1024. */
  queue?: number;
  /** Commands that wait for their answer, unsent messages included. Past that they are rejected
   *  with `OverflowError`. Default: 256. */
  outbox?: number;
  /** An implementation, where there is no global one (Node.js 20). */
  WebSocket?: any;
  fetch?: typeof fetch;
}

export interface JoinOptions {
  /** Go on from here: what was missed comes first. */
  since?: Position;
  /** So many of the latest events come first (up to 256), or, with `since`, where it cannot be told
   *  that nothing is missing. */
  last?: number;
}

export interface SendOptions {
  /** Random by default. A message with a key that is remembered is not stored again. */
  key?: string;
  /** False: this client's own room does not show the message. */
  echo?: boolean;
}

/** At most one of `before` and `after`; the latest without either. */
export interface HistoryOptions {
  before?: number;
  after?: number;
  /** Up to 256. Default: 50. */
  limit?: number;
}

/**
 * A joined room: `for await (const event of room)` gives its events, in order, each once.
 *
 * It goes on through reconnects. The iteration ends after `Left`, after `leave()`, when the room is
 * joined again (by another Room) and when the client is closed; it throws the error with which the
 * client closed. Events that nobody takes wait here; a second loop would share them with the first.
 */
export interface Room extends AsyncIterable<Event> {
  readonly name: string;
  /** What this user may do here, such as "rw". */
  readonly rights: string;
  /** The end of the log when the room was last joined: what follows it is live. */
  readonly head: Position;
  /** Of the last event handed out. Join `since` here to go on in another page's life. */
  readonly position: Position;
  /** Whether events come in at present. */
  readonly joined: boolean;
  /** Whether the latest join has everything since the position before. */
  readonly recovered: boolean;
  send(body: unknown, options?: SendOptions): Promise<Position>;
  history(options?: HistoryOptions): Promise<History>;
  /** Nothing to do for one that has ended: another Room of this name stays. */
  leave(): Promise<void>;
}

/**
 * Stays connected until `close()`, or until coming back is of no use.
 *
 * Commands wait for the connection and survive its loss. They reject with `CommandError` when the
 * server refuses them, with `TimeoutError` when no answer comes within the deadline, with
 * `OverflowError` when too many wait, and with the error of the client's end when it is closed.
 */
export interface Client {
  readonly state: State;
  /** The latest; undefined before the first connection. */
  readonly welcome?: Welcome;
  /** When the token in use expires, by the server's clock: `client.expires_at - client.now()`. */
  readonly expires_at?: number;
  /** The server's clock. */
  now(): number;
  /** Wait until there is a connection. Rejects with the error of the client's end. */
  opened(): Promise<void>;
  /** Call `watcher` with each new state; returns a function that ends it. */
  watch(watcher: (state: State) => void): () => void;

  /** Wait until the room is joined, for as long as the deadline; `leave` gives it up before.
   *  Joining a room again gives a new Room in the place of the old; a join that still waits then
   *  rejects with `ChatError`. */
  join(name: string, options?: JoinOptions): Promise<Room>;
  leave(name: string): Promise<void>;
  /**
   * Publish a JSON value, and tell its position; joining is not needed.
   *
   * It is stored once, however often it has to be sent, and those of one room stand in the order of
   * the calls. It is repeated, on one connection or the next, while the server is sure to remember
   * its key (10 minutes by default, since it may have been stored); then, and when the client ends,
   * it rejects with `UnknownOutcomeError`. What was certainly not stored waits as long as it takes.
   */
  send(room: string, body: unknown, options?: SendOptions): Promise<Position>;
  history(room: string, options?: HistoryOptions): Promise<History>;
  /** Continue the connection under a new token: the one given, or one of the token function. */
  refresh(token?: string): Promise<Refreshed>;
  /** End the session everywhere, and close. */
  logout(): Promise<void>;
  /** The server's clock. Not needed to keep a connection alive. */
  ping(): Promise<number>;
  /** Look whether the connection is alive, or end the wait for the next try. Browsers call it by
   *  themselves when the network or the page comes back; React Native has to be told. */
  wake(): void;
  /** Close for good. What still waits is rejected; iterations end. */
  close(): void;
}

/** Connect to `url` (`wss://…/v1/ws`). Returns at once. Throws TypeError for a URL, a token or a
 *  queue that can be none. */
export function connect(url: string | URL, options: Options): Client;

/** What a login and each trade of a refresh token give. */
export interface Pair {
  readonly access_token: string;
  readonly refresh_token: string;
  readonly session: string;
  readonly expires_at: number;
  readonly refresh_expires_at: number;
}

export interface KeeperOptions {
  /** Store the new pair, durably: it is not used before this has returned. */
  save?: (pair: Pair) => Promise<void> | void;
  /** Read the pair stored, where tabs share it: another one may have traded it. */
  load?: () => Promise<Pair | null | undefined> | Pair | null | undefined;
  /** Default: `navigator.locks`, where there is one. */
  locks?: { request(name: string, work: () => Promise<string>): Promise<string> };
  fetch?: typeof fetch;
}

/** A token function for `connect`. Clients may share it. Rejects with `TokenRefusedError` when the
 *  session is over: log in again. Any other `ChatError` will pass. */
export interface TokenKeeper {
  (wanted?: { stale?: string; now?: boolean }): Promise<string>;
  /** The latest that was saved. */
  readonly pair: Pair;
}

/**
 * Keep a pair of tokens fresh over `POST /v1/tokens/refresh`, one trade at a time. `url` is the
 * WebSocket's.
 *
 * Where tabs share a pair, give `load`: one of them trades at a time, by `navigator.locks`, and the
 * others take what it has saved. Without it, give each tab a session of its own.
 */
export function tokenKeeper(url: string | URL, pair: Pair, options?: KeeperOptions): TokenKeeper;

/** Whatever the server, or the way to it, made of a request. */
export class ChatError extends Error {
  /** Whether coming back, with a good token, would end the same way. */
  readonly final: boolean;
}

/** An HTTP answer that is no success. `code` is undefined when it was not chatserver's. */
export class RefusedError extends ChatError {
  constructor(status: number, code: string | undefined, message: string, retry_after?: number);
  readonly status: number;
  readonly code?: string;
  readonly retry_after?: number;
}

/** The server does not take this refresh token, and never will: somebody has to log in. */
export class TokenRefusedError extends RefusedError {}

/** The server's answer to a command is an error; the connection goes on. */
export class CommandError extends ChatError {
  constructor(code: string, message: string, more?: { retry_after?: number; path?: string });
  readonly code: string;
  readonly retry_after?: number;
  readonly path?: string;
  /** Whether the same command may succeed a little later. */
  readonly temporary: boolean;
  /** Whether it may have taken effect all the same. */
  readonly doubtful: boolean;
}

/** There is no connection any more. `code` is the close code, 1006 where none came. */
export class DisconnectedError extends ChatError {
  constructor(code: number, reason: string, after?: number);
  readonly code: number;
  readonly reason: string;
  readonly after?: number;
}

/** A message may have been stored or not, and it is too late to find out by sending it again. If
 *  its `key` is seen in a room, it was. `why` ended the tries: undefined when the server has
 *  forgotten the key by now. */
export class UnknownOutcomeError extends ChatError {
  constructor(key: string, why?: Error);
  readonly key: string;
  readonly why?: Error;
}

/** More is waiting to be answered than the client's `outbox` holds. */
export class OverflowError extends ChatError {}

/** No answer came within the deadline. */
export class TimeoutError extends ChatError {}
