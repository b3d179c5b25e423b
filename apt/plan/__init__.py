"""What a run would take, before it is started: memory by part, time, traffic, and what fits.

Nothing is estimated by formula that the trainer itself can be asked: its own networks and steps are
run without data (`torch._subclasses.FakeTensorMode`), as rank 0 of ranks that are not there.
"""

from __future__ import annotations
