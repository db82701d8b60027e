"""Ledgers of an evaluation: one record per problem and sample, beside a file with the settings under which they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.ledger import Ledger, changed_settings

SampleKey = tuple[str, int]  #: problem and sample
_KEY = ("problem", "sample")


def open_samples(path: Path, settings: Mapping[str, Any] | None, replace: bool = False) -> Ledger:
    """The ledger at `path`, whose records depend on `settings`.

    Args:
        path: of the records; it is made if it is missing.
        settings: what the records depend on; must survive JSON. None: those that the file was begun with.
        replace: start again if the records were made under other settings.

    Raises:
        ConfigError: the records were made under other settings, or none are given and there are none.
        DataError: see `Ledger`, and a file of settings that cannot be read or written.
    """
    beside = settings_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if settings is None:
            read_settings(path)
        else:
            _settle_file(path, beside, json.loads(json.dumps(settings)), replace)
    except OSError as error:
        raise DataError(f"{beside}: cannot be read or written ({error.strerror})") from error
    return Ledger(path, _KEY)


def settings_path(path: Path) -> Path:
    """The file with the settings of a ledger."""
    return path.with_suffix(".settings.json")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a ledger was begun with.

    Raises:
        ConfigError: it was not begun.
        DataError: their file cannot be read.
    """
    known = _known_settings(settings_path(path))
    if known is None:
        raise ConfigError(f"{path}: there are no responses to score; run the same command without --rescore first")
    return known


def _known_settings(beside: Path) -> dict[str, Any] | None:
    try:
        return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    except ValueError:
        raise DataError(f"{beside} is damaged: restore it, or choose another run_dir") from None


def _settle_file(path: Path, beside: Path, settings: dict[str, Any], replace: bool) -> None:
    """Write the settings before the first record; they stay unless there is no record or `replace` is set."""
    known = _known_settings(beside)
    if known == settings:
        return
    if known is not None and not replace and path.is_file() and path.stat().st_size:
        for name, before, now in changed_settings(known, settings):
            raise ConfigError(f"{path} was begun with {name}={before}, now it is {now}: restore it, or choose another run_dir")
        gone = ", ".join(sorted(set(known) - set(settings)))
        raise ConfigError(f"{path} was begun with other settings ({gone}): choose another run_dir")
    path.unlink(missing_ok=True)
    write_atomically(beside, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
