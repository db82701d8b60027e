"""Hugging Face folders: exact, whole or absent, and a clear line for whatever is wrong with one."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.weights import hf
from megatron_r1.weights.fp8 import dequantize, is_fp8_weight, quantize, scale_name
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.hf_export import export_hf, hf_tensors, write_configs, write_index
from megatron_r1.weights.mapping import hf_shapes
from megatron_r1.weights.safetensors_file import plan_files
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
        save_file({tensor.name: tensors[tensor.name].clone() for tensor in planned}, folder / file, metadata={"format": "pt"})
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


def test_fp8_weights_are_read_as_their_values(tmp_path, published, monkeypatch):
    monkeypatch.setattr(hf, "_STRIPE_BYTES", 7_000)  # many stripes, which end inside blocks
    folder = HfFolder(write_folder(tmp_path / "model", published, max_shard_bytes=200_000))
    assert len(set(folder.files.values())) > 5
    folder.check_names(hf_shapes(FP8_ARCH))
    folder.check_shapes(hf_shapes(FP8_ARCH))
    for name in hf_shapes(FP8_ARCH):
        stored, scales = published[name], published.get(scale_name(name))
        want = stored if scales is None else dequantize(stored, scales, torch.bfloat16)
        got = folder.read(name)
        assert got.dtype is want.dtype and torch.equal(got, want) and folder.shape(name) == tuple(want.shape)
        assert folder.dtype(name) is stored.dtype
    assert sum(map(folder.nbytes, folder.files)) == sum(tensor.nbytes for tensor in published.values())


def test_slices_need_not_be_aligned_with_blocks(tmp_path, published, monkeypatch):
    monkeypatch.setattr(hf, "_STRIPE_BYTES", 7_000)
    folder = HfFolder(write_folder(tmp_path / "model", published))
    whole = dequantize(published[FP8_NAME], published[scale_name(FP8_NAME)], torch.float32)  # 200 x 300
    everything = slice(None)
    for rows, columns in ((slice(100, 140), slice(120, 290)), (slice(127, 128), everything), (everything, slice(299, None))):
        assert torch.equal(folder.read(FP8_NAME, rows, columns, torch.float32), whole[rows, columns])
    name = "model.embed_tokens.weight"
    assert torch.equal(folder.read(name, slice(5, 99), slice(3, 50), torch.float32), published[name][5:99, 3:50].float())
    assert torch.equal(folder.read("model.norm.weight", slice(50, 60), slice(0, 1)), published["model.norm.weight"][50:60])
    assert folder.read(name, slice(130, 200)).shape == (0, 200)


def test_nothing_is_mapped_into_memory(folder):
    opened = HfFolder(folder)
    opened.read("lm_head.weight")
    assert ".safetensors" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", scale_name(FP8_NAME)])
def test_values_that_are_no_numbers_are_named(tmp_path, published, name, value):
    bad = published[name].clone()
    bad.view(-1)[-1] = value
    folder = HfFolder(write_folder(tmp_path / "model", {**published, name: bad}))
    with pytest.raises(ConversionError, match=f"tensor {name} in .*{SHARD} holds NaN or infinite"):
        folder.read(name.removesuffix("_scale_inv"))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_named(tmp_path, published, code):
    bad = published[FP8_NAME].clone()
    bad.view(torch.uint8)[130, 7] = code
    folder = HfFolder(write_folder(tmp_path / "model", {**published, FP8_NAME: bad}))
    assert folder.read(FP8_NAME, slice(0, 130)).isfinite().all()
    with pytest.raises(ConversionError, match=f"tensor {FP8_NAME} in .*{SHARD} holds NaN"):
        folder.read(FP8_NAME)


def test_fp8_needs_fitting_scales(tmp_path, published):
    scales, path = scale_name(FP8_NAME), tmp_path / "model" / "model.safetensors"
    write_folder(tmp_path / "model", {FP8_NAME: published[FP8_NAME]})
    (path.parent / INDEX).unlink()
    one = published[scales]
    for tensors, error, message in (
        ({FP8_NAME: published[FP8_NAME]}, ConversionError, f"{FP8_NAME} in .* is F8_E4M3 without {scales}"),
        ({scales: one}, CheckpointError, f"has scales {scales} without their weight"),
        ({FP8_NAME: torch.ones(200, 300), scales: one}, ConversionError, f"{FP8_NAME} in .* is F32 but has {scales}"),
        ({FP8_NAME: published[FP8_NAME], scales: one[:1]}, ConversionError, r"is F32 \[1, 3\], expected F32 \[2, 3\]"),
        ({FP8_NAME: published[FP8_NAME], scales: one.half()}, ConversionError, r"is F16 \[2, 3\], expected F32 \[2, 3\]"),
    ):
        save_file(tensors, path)
        for look in (HfFolder.read, lambda folder, name: folder.check_shapes({name: (200, 300)})):
            with pytest.raises(error, match=message):
                look(HfFolder(path.parent), FP8_NAME)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config is not block-scaled FP8"),
        ("fp8", "quantization_config is not block-scaled FP8"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"quantization_config.weight_block_size is \[64, 128\]"),
    ],
)
def test_other_quantisations_are_refused(folder, quantization, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        HfFolder(folder)


def test_an_index_that_lies_is_refused(folder):
    index = json.loads((folder / INDEX).read_text())

    def lie(**changes: object) -> None:
        weight_map = {name: file for name, file in {**index["weight_map"], **changes}.items() if file}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    save_file({"model.norm.weight": torch.ones(64)}, folder / "other.safetensors")
    lie(extra="other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors holds tensor model.norm.weight, which .* places in model-00001"):
        HfFolder(folder).read("extra")
    save_file({"unlisted": torch.ones(64), "extra": torch.ones(1)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors holds tensor unlisted, which .* does not know"):
        HfFolder(folder).read("extra")
    lie(extra=SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD} does not hold tensor extra, which {INDEX} says it does"):
        HfFolder(folder).check_shapes({"lm_head.weight": (130, 64)})
    lie(extra="../elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="names ../elsewhere.safetensors, which is not a file of this folder"):
        HfFolder(folder)
    lie(extra=7)
    with pytest.raises(CheckpointError, match=f"{INDEX} has no weight_map"):
        HfFolder(folder)


def test_wrong_shapes_and_integers_are_named(folder):
    opened = HfFolder(folder)
    opened.check_shapes(hf_shapes(ARCH))
    with pytest.raises(ConversionError, match=rf"tensor lm_head.weight in .*{SHARD} has shape \[130, 64\], expected \[64, 130\]"):
        opened.check_shapes({"lm_head.weight": (64, 130)})
    with pytest.raises(ConversionError, match="has no tensor nowhere"):
        opened.read("nowhere")
    (folder / INDEX).unlink()
    save_file({"lm_head.weight": torch.ones(3, dtype=torch.int64)}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="tensor lm_head.weight in .*model.safetensors is I64; weights are one of F64"):
        HfFolder(folder).read("lm_head.weight")


def test_a_pickle_is_never_loaded(folder):
    torch.save({}, folder / SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD} is not a readable .*: it is a pickle under this name"):
        HfFolder(folder).read("lm_head.weight")
    (folder / SHARD).unlink()
    (folder / INDEX).unlink()
    torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"; pytorch_model-00001-of-00002.bin is a pickle, which is never loaded: convert"):
        HfFolder(folder)


def test_other_architectures_and_dtypes_are_exported(tmp_path):
    arch = qwen2_architecture()
    weights = list(random_weights(arch, 0, dtype=torch.bfloat16))
    export_hf(weights, arch, tmp_path / "model", bos_token_id=0, eos_token_id=1)
    opened = HfFolder(tmp_path / "model")
    assert opened.architecture().model_dump(exclude={"init_std"}) == arch.model_dump(exclude={"init_std"})
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in weights)
    weights[3] = (weights[3][0], weights[3][1].float())
    with pytest.raises(ConversionError, match=rf"{weights[3][0]} for .* torch.float32, announced was .* torch.bfloat16"):
        export_hf(weights, arch, tmp_path / "other", bos_token_id=0, eos_token_id=1)
    with pytest.raises(ConversionError, match="lack 50 tensors"):
        export_hf([], arch, tmp_path / "other", bos_token_id=0, eos_token_id=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_holds_one_tensor_and_takes_any_order(tmp_path):
    weights = dict(random_weights(ARCH, 0))
    held: list[weakref.ref] = []

    def stream():
        for name in reversed(hf_shapes(ARCH)):
            assert not held or held[-1]() is None, "the tensor before is still held"
            tensor = weights[name].clone()
            held.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    export(stream(), tmp_path / "model", max_shard_bytes=100_000)
    opened = HfFolder(tmp_path / "model")
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in weights.items())
