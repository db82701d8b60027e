"""Devices that a plan can be made for."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.errors import ConfigError

CPU = "cpu"  #: no accelerator: ranks share the memory of their node

_MIB = 2**20


@dataclass(frozen=True)
class Accelerator:
    """One device of a rank."""

    name: str
    memory_bytes: int  #: that the driver shows of a device


#: Memory: what nvidia-smi shows as the total of one device.
DEVICES = {
    device.name: device
    for device in (
        Accelerator("A100", 81_920 * _MIB),
        Accelerator("H20", 97_871 * _MIB),
        Accelerator("H800", 81_559 * _MIB),
        Accelerator("H100", 81_559 * _MIB),
        Accelerator("H200", 143_771 * _MIB),
        Accelerator("B200", 183_359 * _MIB),
        Accelerator("GB200", 189_471 * _MIB),
    )
}


def device_named(name: str) -> Accelerator:
    """The device of this name, in any spelling of case. Raises ConfigError for one that is not in the table."""
    found = DEVICES.get(name.upper())
    if found is None:
        raise ConfigError(f"--gpu {name}: there is no such device in the table; it has {', '.join(DEVICES)}")
    return found
