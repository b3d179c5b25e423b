"""Measuring: kernels and whole networks against the machine's limits, records, and gates.

Correctness comes first: what gives a wrong result gets no time. Times of variants come from one
run, in turns, so that a machine that slows down slows them all.
"""
