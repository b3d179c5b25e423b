"""Ranks: launch variables, devices, the mesh, sharding, and collectives.

Only this package imports `torch.distributed` or reads the launcher's variables.
"""

from __future__ import annotations
