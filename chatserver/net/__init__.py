"""Speaks to clients: sockets, connections, fan-out. Does I/O and decides nothing."""
