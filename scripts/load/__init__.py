"""A load test: many connections to a chat server, and what became of everything that was sent."""
