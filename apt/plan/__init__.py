"""Plan a run before it starts: memory by part, time, traffic, and layouts that fit.

The figures come from the trainer itself, not from formulas. Its own networks and steps run on
tensors without data (`torch._subclasses.FakeTensorMode`), as rank 0 of simulated ranks.
"""

from __future__ import annotations
