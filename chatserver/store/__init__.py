"""Speaks to Redis and to key material."""
