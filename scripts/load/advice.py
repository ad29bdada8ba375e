"""What was hit, in plain sentences: which setting to raise on the server, or what else to do."""

from __future__ import annotations

from .results import BUSY, Effort, Results
from .tally import total

SENTENCES = {
    # By the count that is above nought.
    "refused_429_rate_limited": "The server lets each address make only so many handshakes a "
    "second: raise CHATSERVER_HANDSHAKE_RATE on the test server, or lower --ramp.",
    "refused_429_too_many_connections": "A user may have only so many connections: raise "
    "CHATSERVER_USER_CONNECTIONS on the test server, or bring tokens of more users.",
    "refused_503_overloaded": "The server had too many handshakes under way, or as many "
    "connections as it may have: lower --ramp, or raise CHATSERVER_CONNECTIONS and the limit of "
    "descriptors (ulimit -n) on the test server.",
    "refused_503_unavailable": "The server could not reach its store, or not in time.",
    "refused_401": "The server does not accept these tokens: it has another secret, issuer or "
    "audience than this shell, or the tokens of the file have expired. Set CHATSERVER_SECRET, or "
    "CHATSERVER_DATA_DIR, to the server's.",
    "refused_ECONNREFUSED": "Nobody listens at this address, or the server's queue was full.",
    "refused_EMFILE": "This process may not open more sockets: raise ulimit -n, or --processes.",
    "refused_timeout": "Handshakes took more than 10 s: the server is overloaded, or stands still.",
    "refused_no_token": "Refresh tokens were not traded: each is good for one run, so bring new "
    "ones.",
    "refused_SSLCertVerificationError": "The certificate is not one that this machine trusts: "
    "name its authority in SSL_CERT_FILE.",
    "error_forbidden": "The tokens give no right to these rooms, whose names begin with load-.",
    "error_room_limit": "A client may be in only so many rooms: raise CHATSERVER_ROOMS on the test "
    "server.",
    "error_too_large": "Messages are larger than the server takes: raise CHATSERVER_FRAME_BYTES on "
    "the test server, or lower --bytes.",
    "error_unavailable": "The server's store did not keep up, or was away: what was refused was "
    "repeated.",
    "error_control_401": "The control API does not know this CHATSERVER_CONTROL_KEY.",
    "error_control_no_answer": "The control API did not answer: --control says where it is.",
    "closed_4401": "Tokens expired during the run: bring pairs (--tokens), or let this command "
    "make them.",
    "closed_4430": "Readers were closed for being slow (4430). If they are not meant to be, the "
    "load test cannot read as fast as the server writes; CHATSERVER_SLOW_SECONDS is how long a "
    "reader may stay behind.",
    "closed_4505": "Connections of one user replaced each other (4505): raise "
    "CHATSERVER_USER_CONNECTIONS on the test server, or bring tokens of more users.",
    "unrecovered": "Clients came back later than the log reaches: raise CHATSERVER_HISTORY and "
    "CHATSERVER_REPLAY on the test server, if they should not have.",
    "accepted_after_revocation": "The server accepted tokens that were revoked. That is a fault.",
    "lost": "Events were lost. That is a fault of the server, or of what stands before it.",
    "doubled": "Events were delivered twice. That is a fault.",
    "reordered": "Events were delivered out of order. That is a fault.",
    "stray": "Events came from rooms that had not been joined. That is a fault.",
    "overdue": "Not everything that was acked had arrived when --grace was over: the server was "
    "behind, or lost the last events of a room.",
}


def notices(results: Results) -> list[str]:
    """Sentences for a person, what matters most first."""
    found = []
    counts, options = results.counts, results.options
    slowest = [effort for effort in results.efforts() if effort.bottleneck]
    if slowest:
        found.append(_bottleneck(max(slowest, key=lambda effort: effort.strain)))
    if results.ended_early:
        found.append("It was ended early.")
    if total(counts, "error_rate_limited"):
        found.append(_send_rate(results))
    found += [sentence for name, sentence in SENTENCES.items() if total(counts, name)]
    if options.sockets > counts["connects"] > 0 and not results.ended_early:
        found.append(f"Only {counts['connects']:,} of {options.sockets:,} clients got in.")
    return found


def _bottleneck(worst: Effort) -> str:
    found = (
        f"The load test itself was the bottleneck: process {worst.process + 1} took "
        f"{worst.cpu:.0%} of a core in the {worst.phase}, and was up to {worst.lag_p99:.0f} ms "
        "late (p99). So latencies are too high and rates too low by its own part. "
    )
    if worst.cpu > BUSY:
        return found + "Give it more --processes, on cores that the server does not use."
    return found + (
        "Others had the processor, or much came at once: give it cores of its own, or another "
        "machine."
    )


def _send_rate(results: Results) -> str:
    options = results.options
    senders = options.publishers or options.clients
    if options.rate:
        how = f"{options.rate / senders:.3g} a second from each of {senders:,} senders"
    else:
        how = f"a window of {options.window} for each of {senders:,} senders"
    return (
        f"The server lets a connection send {results.send_rate:g} messages a second, and this load "
        f"is {how}: raise CHATSERVER_SEND_RATE and CHATSERVER_SEND_BURST on the test server, or "
        "give more --publishers. What was refused was sent again when the server allowed it, and "
        "the wait is in the latencies."
    )
