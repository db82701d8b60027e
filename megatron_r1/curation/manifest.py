"""What a curated file was made of: counts by domain, filter and evaluation set, hashes, seed, settings; the counts as a table."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.data.unpacked import read_once
from megatron_r1.errors import DataError
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table

MANIFEST = "manifest.json"


@dataclass
class RecordCounts:
    """Records by domain, after each step and by what dropped them."""

    read: Counter[str] = field(default_factory=Counter)
    filtered: dict[str, Counter[str]] = field(default_factory=dict)  #: filter -> domain -> records
    duplicates: Counter[str] = field(default_factory=Counter)
    contaminated: dict[str, Counter[str]] = field(default_factory=dict)  #: evaluation set -> domain -> records
    left: Counter[str] = field(default_factory=Counter)  #: before the mix
    mixed: Counter[str] = field(default_factory=Counter)  #: written, copies included

    def drop(self, step: str, name: str, domain: str) -> None:
        """Count a record that `step` ("filter", "duplicate" or "contamination") dropped."""
        if step == "duplicate":
            self.duplicates[domain] += 1
        else:
            by_name = self.filtered if step == "filter" else self.contaminated
            by_name.setdefault(name, Counter())[domain] += 1


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Path, size and SHA-256.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with read_once(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        return {"path": str(path), "bytes": size, "sha256": digest}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest as the last file of its folder: a folder with a manifest is finished."""
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def remove_manifest(folder: Path) -> None:
    """Call this before the files of a finished folder are replaced: without a manifest the folder is not finished."""
    (folder / MANIFEST).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None if there is none or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def count_fields(counts: RecordCounts) -> dict[str, Any]:
    """The counts as the manifest holds them."""
    return dict(vars(counts))  # counters are written as the objects they are


def render_counts(counts: RecordCounts) -> str:
    """A markdown table, aligned for a terminal: one row a step, one column a domain."""
    domains = sorted(counts.read)
    rows = [("read", counts.read)]
    rows += [(f"- filter: {name}", by_domain) for name, by_domain in counts.filtered.items()]
    rows += [("- near-duplicate", counts.duplicates)] if counts.duplicates else []
    rows += [(f"- in evaluation set: {name}", by_domain) for name, by_domain in counts.contaminated.items()]
    rows += [("left", counts.left), ("in the mix", counts.mixed)]
    total = counts.mixed.total()
    cells = [["records", *domains, "all"]]
    cells += [[label, *(f"{row[domain]:,}" for domain in domains), f"{row.total():,}"] for label, row in rows]
    shares = [f"{counts.mixed[domain] / total:.1%}" if total else "" for domain in domains]
    cells.append(["share of the mix", *shares, "100.0%" if total else ""])
    return align_table(cells, numbers=True)
