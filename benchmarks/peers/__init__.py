"""Implementations that benchmarks/cpu_peers.py measures, and what bounds them."""
