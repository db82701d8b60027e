"""Free memory of the machine or of its container, from the kernel's files."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.runtime.memory import free_memory, memory_nodes


def test_a_container_has_less_than_the_machine(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   4000 kB\n")

    def free(limit: str, used: int, cached: int) -> int:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file 0\nfile 99\n")
        return free_memory(tmp_path / "meminfo", tmp_path)

    assert free_memory(tmp_path / "meminfo", tmp_path / "none") == 4000 << 10
    assert free("max", 5, 0) == 4000 << 10
    assert free(str(3000 << 10), 1000 << 10, 500 << 10) == 2500 << 10
    assert free(str(3000 << 10), 4000 << 10, 0) == 0
    assert free(str(9000 << 10), 1000 << 10, 0) == 4000 << 10
    assert memory_nodes(tmp_path) == 1
    for name in ("node0", "node1", "possible"):
        (tmp_path / name).mkdir()
    assert memory_nodes(tmp_path) == 2 and free_memory() > 0 and memory_nodes() >= 1
