"""What passes from stage to stage: a Hugging Face folder with the config that made it and the hashes of its inputs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError

MANIFEST = "artifact.json"
_HASHED = (".safetensors", ".json", ".jsonl", ".gz", ".parquet", ".arrow")


@dataclass(frozen=True)
class Artifact:
    """A finished stage's output folder."""

    folder: Path

    @property
    def exists(self) -> bool:
        """Whether the stage finished: the manifest is written last."""
        return (self.folder / MANIFEST).is_file()

    def seal(self, stage: str, config: dict[str, Any], inputs: dict[str, Path]) -> None:
        """Write the manifest: which stage, with which config, from which inputs (by hash), and the hash of the result."""
        manifest = {
            "stage": stage,
            "inputs": {name: {"path": str(path), "sha256": hash_files(path)} for name, path in inputs.items()},
            "sha256": hash_files(self.folder),
            "config": config,
        }
        temporary = self.folder / f"{MANIFEST}.tmp-seal"
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.rename(self.folder / MANIFEST)

    def made_with(self) -> tuple[str, Config, dict[str, str]]:
        """The stage that made it, the config of then, and the hashes of its inputs.

        Raises:
            CheckpointError: the manifest is damaged, or this version knows its settings no more.
        """
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            config = Config.model_validate(manifest["config"], strict=True)
            return str(manifest["stage"]), config, {name: of["sha256"] for name, of in manifest["inputs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path} cannot be read ({reason:.200}): remove {self.folder} to make it again") from None

    def verify(self) -> None:
        """Compare the folder with its manifest.

        Raises:
            CheckpointError: there is no manifest, or the files have changed since.
        """
        if not self.exists:
            raise CheckpointError(f"{self.folder} is no finished stage: it has no {MANIFEST}")
        if json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))["sha256"] != hash_files(self.folder):
            raise CheckpointError(f"{self.folder} has changed since its stage finished: remove the folder to make it again")


def hash_files(path: Path) -> str:
    """SHA-256 over name and content of a file, or of a folder's weights, JSON files and tables, without the manifest."""
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _HASHED and p.name != MANIFEST)
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(f"{file.name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
