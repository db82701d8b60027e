"""Hugging Face folders: exact, whole or absent, and a clear line for whatever is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.weights.fp8 import dequantize, is_fp8_weight, quantize, scale_name
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.hf_export import export_hf, hf_tensors, write_configs, write_index
from megatron_r1.weights.mapping import hf_shapes
from megatron_r1.weights.safetensors_file import plan_files, write_safetensors
from tests.random_weights import full_architecture, qwen2_architecture, random_weights, write_random_model

ARCH = full_architecture(mtp=1)
SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
FP8_NAME = "model.layers.0.mlp.down_proj.weight"


def with_sizes(**sizes: int):
    """The small model with larger parts, so that FP8 blocks are ragged and there are several."""
    return type(ARCH)(**{**ARCH.model_dump(), **sizes})


FP8_ARCH = with_sizes(hidden_size=200, intermediate_size=300)


def fp8_tensors(arch) -> dict[str, torch.Tensor]:
    """A model as DeepSeek publishes it: projections in FP8 with scales, router biases in float32, the rest in bfloat16."""
    tensors = {}
    for name, tensor in random_weights(arch, 0, dtype=torch.bfloat16):
        if is_fp8_weight(name):
            tensors[name], tensors[scale_name(name)] = quantize(tensor)
        else:
            tensors[name] = tensor
    return tensors


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> Path:
    """A folder of any tensors, fit for the model or not, with a config of block-scaled FP8."""
    folder.mkdir()
    names = [tensor for tensor in hf_tensors(hf_shapes(FP8_ARCH), torch.float8_e4m3fn) if tensor.name in tensors]
    files = plan_files(names, max_shard_bytes)
    for file, planned in files.items():
        write_safetensors(folder / file, planned, ((tensor.name, tensors[tensor.name]) for tensor in planned))
    write_index(folder, files)
    write_configs(folder, FP8_ARCH, torch.float8_e4m3fn, bos_token_id=0, eos_token_id=1)
    return folder


@pytest.fixture(scope="module")
def published():
    return fp8_tensors(FP8_ARCH)


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
