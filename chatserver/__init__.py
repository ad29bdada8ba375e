"""A real-time WebSocket chat server: one token's whole life, every message once and in order."""
