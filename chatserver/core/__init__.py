"""Decides and touches nothing: time, ids and randomness arrive as arguments."""
