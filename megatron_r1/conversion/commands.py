"""What each sub-command of the converter does, given its arguments."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_r1.config.model import ParallelConfig
from megatron_r1.conversion.compare import compare_folders
from megatron_r1.conversion.dry_run import dry_run
from megatron_r1.conversion.dtypes import BY_NAME
from megatron_r1.conversion.export_hf import export_folder
from megatron_r1.conversion.import_hf import import_folder
from megatron_r1.runtime import distributed, launch
from megatron_r1.runtime.device import resolve_device


def run_action(arguments: argparse.Namespace) -> int:
    """Run `arguments.action`. Returns the exit code. Raises R1Error."""
    sizes = ParallelConfig(
        **{name: getattr(arguments, name) for name in ("tp", "pp", "vpp", "ep", "etp") if hasattr(arguments, name)}
    )
    dtype = BY_NAME.get(getattr(arguments, "dtype", None))
    if arguments.action == "dry-run":
        launch.configure_threads(1)
        print(dry_run(arguments.config, sizes, dtype, arguments.table), flush=True)
        return 0
    with _peers():
        if arguments.action == "import":
            import_folder(arguments.hf, arguments.out, sizes, dtype, arguments.max_file_size)
            _print_once(f"{arguments.out}: written")
        elif arguments.action == "export":
            export_folder(arguments.megatron, arguments.out, dtype, arguments.max_file_size, of_average=arguments.ema)
            _print_once(f"{arguments.out}: written")
        if arguments.action == "verify":
            _compare(arguments.hf, arguments.megatron)
        elif arguments.verify:
            is_import = arguments.action == "import"
            hf, megatron = (arguments.hf, arguments.out) if is_import else (arguments.out, arguments.megatron)
            _compare(hf, megatron, of_average=not is_import and arguments.ema)
    return 0


@contextmanager
def _peers() -> Iterator[None]:
    """Join the processes that were started together with this one, if there are any."""
    warnings.filterwarnings("ignore", module=r"megatron\.core\b.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b.*")
    info = launch.read_launch()
    launch.configure_threads(1)
    if info.world_size == 1:
        yield
        return
    distributed.join_process_group(info, resolve_device("cpu"))
    try:
        yield
    finally:
        distributed.shutdown()


def _compare(hf: Path, megatron: Path, *, of_average: bool = False) -> None:
    _print_once(f"{hf} and {megatron}: {compare_folders(hf, megatron, of_average=of_average)}")


def _print_once(line: str) -> None:
    if distributed.is_rank_zero():
        print(line, flush=True)
