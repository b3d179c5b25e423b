"""Ranks: what the launcher says, devices, the mesh, sharding, and what ranks do together.

Nothing above imports `torch.distributed` or reads the launcher's variables itself.
"""

from __future__ import annotations
