"""What a measurement was made on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

# Read by each thread, larger than a last-level cache.
BUFFER = 1 << 28


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, threads used, memory and the rate at which the threads read it."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": memory_gb(),
        "read_gb_per_s": read_bandwidth(threads),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def physical_cores() -> int:
    """Cores that this process may use, two threads of one counted once, as far as the system tells."""
    able = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    with suppress(OSError):
        cpus = Path("/sys/devices/system/cpu")
        return len({(cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in able})
    return len(able)


def memory_gb() -> float | None:
    """Physical memory in units of 10^9 bytes, None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def free_memory() -> int | None:
    """Bytes that new processes can use, None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024


def read_bandwidth(threads: int) -> float | None:
    """Memory read by so many threads at once, in GB/s: the best of three passes of the C library's memchr.

    memchr reads at the speed of the memory and, called through ctypes, does not hold the interpreter's lock.
    """
    try:
        find = ctypes.CDLL(None).memchr
    except (OSError, TypeError, AttributeError):
        return None
    find.restype, find.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    buffers = [np.full(BUFFER, 1, np.uint8) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            clock = perf_counter()
            list(pool.map(lambda buffer: find(buffer.ctypes.data, 0, BUFFER), buffers))
            best = min(best, perf_counter() - clock)
    return round(threads * BUFFER / best / 1e9, 1)
