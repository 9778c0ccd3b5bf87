"""Serve many tuners from one base: throughput and latency of the engine, beside other ways to serve them."""
