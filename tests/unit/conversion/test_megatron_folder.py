"""What a conversion copies beside the weights."""

from __future__ import annotations

import json

import pytest

from megatron_r1.conversion.megatron_folder import copy_companions

KEPT = {
    "config.json": {}, "generation_config.json": {}, "tokenizer.json": {}, "tokenizer_config.json": {}, "chat_template.jinja": "",
    "special_tokens_map.json": {}, "added_tokens.json": {}, "vocab.json": {}, "merges.txt": "", "tokenizer.model": "",
    "qwen.tiktoken": "", "LICENSE": "", "LICENSE-MODEL": "",
}  # fmt: skip
FOREIGN = (
    "progress.json", "state.json", "schedule.json", "trainer_state.json", "model.safetensors.index.json", "artifact.json",
    "model-00001-of-00002.safetensors", "pytorch_model.bin", "README.md", "notes.txt", "figure.json", "train.py", "weights.model",
    ".config.json.tmp",
)  # fmt: skip
CODE = {"modeling_x.py": "from .configuration_x import X\nimport os\n", "configuration_x.py": "", "tokenization_x.py": ""}


@pytest.mark.parametrize("has_code", [False, True])
def test_what_belongs_to_a_model_is_copied_and_nothing_else(tmp_path, has_code):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in FOREIGN:
        (source / name).write_text("{}")
    for name, content in {**KEPT, **CODE}.items():
        (source / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (source / "policy").mkdir()
    if has_code:
        (source / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.Model", "AutoConfig": "../evil.C"}}')
        (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.T", null]}}')
        (tmp_path / "evil.py").write_text("")
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == set(KEPT) | (set(CODE) if has_code else set())
