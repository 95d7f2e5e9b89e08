"""Microbenchmarks: what an op costs on this machine, against the peers and the machine's limits."""
