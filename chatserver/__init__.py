"""A real-time WebSocket chat server: one token's whole life, every message once and in order."""

__version__ = "0.1.0"
