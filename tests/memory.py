"""Memory of torch on the CPU, counted and not sampled."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak memory of `function` beyond what was held before, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def saved_bytes(function: Callable[[], object], *, without: Tensor) -> int:
    """Return the bytes that autograd saves for backward, each storage once, except `without`."""
    sizes: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        result = function()  # alive until all is counted, so that no address is used twice
    sizes.pop(without.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values())
