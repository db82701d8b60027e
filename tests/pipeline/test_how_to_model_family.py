"""docs/how_to/model_family.md, as written: a family in a package of its own, compared with transformers and converted."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1.weights.hf import HfFolder
from tests.followed_pages import follow_page


def test_the_page_adds_a_family(tmp_path: Path) -> None:
    printed = follow_page("model_family.md", tmp_path)
    assert "mistral: logits agree within" in printed
    assert printed.count("tensors are equal") == 2
    assert json.loads((tmp_path / "exported/config.json").read_text())["model_type"] == "mistral"
    assert HfFolder(tmp_path / "exported").files.keys() == HfFolder(tmp_path / "model").files.keys()
