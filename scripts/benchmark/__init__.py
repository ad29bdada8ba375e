"""What scripts/bench.py is made of: servers to measure, one client for all of them."""
