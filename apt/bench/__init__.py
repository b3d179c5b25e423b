"""Benchmarks of kernels and whole networks against the machine's limits, with records and gates.

Correctness comes first: a variant with a wrong result is not timed. All variants are timed in one
run, in turns, so that a machine that slows down affects them equally.
"""
