"""Hugging Face folders: exact, whole or absent, and a clear line for whatever is wrong with one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.weights.hf import HfFolder, export_hf
from megatron_r1.weights.mapping import hf_shapes
from tests.random_weights import full_architecture, random_weights, write_random_model

ARCH = full_architecture(mtp=1)


@pytest.fixture
def folder(tmp_path):
    return write_random_model(tmp_path / "model", ARCH)


def export(weights, folder, **settings):
    export_hf(weights, ARCH, folder, bos_token_id=0, eos_token_id=1, **settings)


def test_written_is_read(folder):
    opened = HfFolder(folder)
    opened.check_names(hf_shapes(ARCH))
    for name, tensor in random_weights(ARCH, 0):
        assert torch.equal(opened.read(name), tensor) and opened.shape(name) == tuple(tensor.shape)
    name = "model.layers.1.self_attn.o_proj.weight"
    whole = dict(random_weights(ARCH, 0))[name]
    assert torch.equal(opened.read(name, slice(3, 7), slice(10, 20)), whole[3:7, 10:20])
    assert opened.config["torch_dtype"] == "float32"


def test_shards_are_bounded_and_indexed(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "notes.txt").write_text("not part of it")
    weights = [(name, tensor.bfloat16() if "bias" not in name else tensor) for name, tensor in random_weights(ARCH, 0)]
    export(weights, tmp_path / "model", max_shard_bytes=100_000, tokenizer=tokenizer)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3 and all(sum(t.nbytes for t in load_file(f).values()) <= 100_000 for f in files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in weights)
    opened = HfFolder(tmp_path / "model")
    assert opened.config["torch_dtype"] == "bfloat16"
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in weights)
    assert (tmp_path / "model" / "tokenizer.json").exists() and not (tmp_path / "model" / "notes.txt").exists()


def test_failed_export_leaves_the_old_folder(folder):
    weights = list(random_weights(ARCH, 1))
    for bad, reason in (
        (weights[:-1], "lack 1 tensors, the first is model.layers.5.shared_head.head.weight"),
        (weights + weights[:1], "model.embed_tokens.weight .*twice"),
        ([("unknown", torch.zeros(1)), *weights], "unknown"),
        ([(weights[0][0], weights[0][1][1:]), *weights[1:]], "embed_tokens"),
    ):
        with pytest.raises(ConversionError, match=reason):
            export(bad, folder)
        assert torch.equal(HfFolder(folder).read("lm_head.weight"), dict(random_weights(ARCH, 0))["lm_head.weight"])
    export(weights, folder)
    assert torch.equal(HfFolder(folder).read("lm_head.weight"), dict(weights)["lm_head.weight"])
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_bad_folders_are_named(folder):
    shard = folder / "model-00001-of-00001.safetensors"
    index = folder / "model.safetensors.index.json"
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        HfFolder(folder.with_name("nowhere"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model-00001-of-00001.safetensors is not a readable"):
        HfFolder(folder).read("lm_head.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match="names model-00001-of-00001.safetensors, which is missing"):
        HfFolder(folder)
    index.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither"):
        HfFolder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        HfFolder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        HfFolder(folder)


def test_missing_and_unknown_tensors_are_named(folder):
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="lacks tensors: model.norm.weight"):
        HfFolder(folder).check_names(hf_shapes(ARCH))
    tensors.update({"model.norm.weight": torch.ones(64), "model.norm.scale": torch.ones(64)})
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="has unknown tensors: model.norm.scale"):
        HfFolder(folder).check_names(hf_shapes(ARCH))


def test_another_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match="qwen2"):
        HfFolder(folder).architecture()
