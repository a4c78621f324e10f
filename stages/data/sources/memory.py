"""How much memory this machine, or the container that it runs in, has left."""

from pathlib import Path

import psutil

CGROUPS = (("memory.max", "memory.stat", "anon"), ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"))
"""Limit, statistics, and the key of what cannot be given back; of version 2 and 1."""


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be used without swapping, and within the container's limit."""
    available = psutil.virtual_memory().available
    for limit, statistics, used in CGROUPS:
        try:
            lines = dict(line.split() for line in (cgroup / statistics).read_text().splitlines())
            available = min(available, int((cgroup / limit).read_text()) - int(lines[used]))
        except (OSError, ValueError, KeyError):  # no such version, or no limit: `max`
            continue
    return max(available, 0)
