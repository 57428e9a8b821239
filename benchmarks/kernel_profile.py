"""What the time of work on a CUDA device is made of: its kernels, and the gaps in which none runs."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_NUM_KERNELS = 8


@dataclass(frozen=True, slots=True)
class KernelShare:
    """Kernels of one name."""

    name: str
    calls: int
    share: float  # of the time from the first kernel's start to the last one's end


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """One run of the work."""

    milliseconds: float  # from the first kernel's start to the last one's end
    num_kernels: int
    gap_share: float  # of this time, in which no kernel ran
    longest: tuple[KernelShare, ...]


def profile_kernels(work: Callable[[], object], device: torch.device) -> KernelProfile:
    """Profile one run of `work`, which ran before, on a CUDA device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events() or ()
        if event.device_type.name == "CUDA" and event.time_range.end > event.time_range.start
    ]
    return summarize(spans)


def summarize(spans: list[tuple[float, float, str]]) -> KernelProfile:
    """From (start, end, name) of every kernel, in microseconds; kernels may overlap."""
    spans = sorted(spans)
    if not spans:
        return KernelProfile(0.0, 0, 0.0, ())
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    busy, busy_until = 0.0, spans[0][0]
    for start, end, name in spans:
        by_name[name].append(end - start)
        busy += max(0.0, end - max(start, busy_until))
        busy_until = max(busy_until, end)
    total = busy_until - spans[0][0]
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_NUM_KERNELS]
    return KernelProfile(
        milliseconds=total / 1e3,
        num_kernels=len(spans),
        gap_share=1 - busy / total,
        longest=tuple(KernelShare(name, len(times), sum(times) / total) for name, times in longest),
    )
