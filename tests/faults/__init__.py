"""Promises under faults: clients, a nemesis, the whole history, and a checker that reads it."""
