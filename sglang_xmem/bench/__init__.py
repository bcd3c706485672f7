"""Benchmarks: `sglang-xmem bench ...`."""
