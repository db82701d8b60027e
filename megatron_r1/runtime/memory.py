"""Memory of this node that is free."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # of a container; only cgroup version 2 has these files
_NODES = Path("/sys/devices/system/node")


def free_memory(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """Bytes that processes may still take: of the machine, or of its container where that has less. The page cache is free."""
    free = next(int(line.split()[1]) << 10 for line in meminfo.read_text("ascii").splitlines() if line.startswith("MemAvailable:"))
    try:
        limit, used = (group / "memory.max").read_text("ascii").strip(), int((group / "memory.current").read_text("ascii"))
        cached = sum(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text("ascii").splitlines()
            if line.startswith(("inactive_file ", "active_file "))
        )
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used + cached))


def memory_nodes(nodes: Path = _NODES) -> int:
    """Parts that the memory of this machine has (NUMA); a process of vLLM takes its cache from one."""
    return max(1, len(list(nodes.glob("node[0-9]*"))))
