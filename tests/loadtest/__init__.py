"""The load test: what it measures, what it counts, and what it says about itself."""
