"""The table reproduces the published checkpoint and accounts for every tensor."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.errors import ConversionError
from megatron_r1.model.presets import PRESETS
from megatron_r1.model.rows import Split
from megatron_r1.weights.fused_tensors import fuse, unfuse
from megatron_r1.weights.groups import OneRank
from megatron_r1.weights.local_weights import local_weights
from megatron_r1.weights.mapping import hf_shapes, model_entries
from tests.random_weights import full_architecture, llama_architecture, qwen2_architecture, random_weights

ARCHITECTURES = {
    **PRESETS,
    "qwen2 tied": qwen2_architecture(),
    "qwen2": qwen2_architecture(tied=False),
    "llama": llama_architecture(),
}


def test_published_checkpoint_is_reproduced():
    """Counts of the DeepSeek-R1 files: 91,991 tensors and 684,531,386,000 elements with the scales of fp8 matrices."""
    shapes = hf_shapes(PRESETS["671b"])
    scaled = [s for name, s in shapes.items() if name.endswith("_proj.weight") and "eh_proj" not in name or "with_mqa" in name]
    scales = [math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in scaled]
    assert len(shapes) + len(scales) == 91_991
    assert sum(map(math.prod, shapes.values())) + sum(scales) == 684_531_386_000
    main = sum(math.prod(s) for name, s in shapes.items() if not name.startswith("model.layers.61."))
    assert main == 671_026_419_200


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_name_is_there_once(arch):
    entries = model_entries(arch)
    for names in ([n for e in entries for n in e.megatron], [n for e in entries for n in (*e.hf, *e.copies)]):
        assert len(names) == len(set(names))


DENSE = {name: arch for name, arch in ARCHITECTURES.items() if arch.experts is None}


@pytest.mark.parametrize("arch", DENSE.values(), ids=DENSE)
def test_dense_names_and_shapes_are_those_of_transformers(arch, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch.to_hf_config(0, 1, "float32")))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if arch.tie_word_embeddings:
        del theirs["lm_head.weight"]  # state_dict names the one tensor twice, a folder has it once
    assert hf_shapes(arch) == theirs


@pytest.mark.parametrize("parts", [1, 2])
def test_query_groups_are_interleaved_as_megatron_wants_them(parts):
    """Megatron's rows, written out by hand: for every group its query heads, then its key head, then its value head."""
    arch, dim = qwen2_architecture(), 16
    weights = dict(random_weights(arch, 0))
    entries = [entry for entry in model_entries(arch) if entry.split is Split.QKV and entry.name.startswith("model.layers.1.")]
    assert [entry.megatron[0].rpartition(".")[2] for entry in entries] == ["weight", "bias"]
    for entry in entries:
        q, k, v = (weights[name] for name in entry.hf)
        heads = [q[:48], k[:16], v[:16], q[48:], k[16:], v[16:]]
        full = fuse(entry, [q, k, v])
        assert torch.equal(full, torch.cat(heads)) and full.shape == entry.full_shape
        for rank, shard in enumerate(full.chunk(parts)):
            pieces = [tensor.chunk(parts)[rank] for tensor in (q, k, v)]
            assert torch.equal(fuse(entry, pieces, parts), shard)
            assert all(map(torch.equal, unfuse(entry, shard, parts), pieces))
        assert [len(piece) for piece in unfuse(entry, full)] == [6 * dim, 2 * dim, 2 * dim]


def test_order_goes_through_the_layers():
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    names = [name for name in hf_shapes(PRESETS["small"]) if name.startswith("model.layers.") and not name.endswith(copies)]
    layers = [int(name.split(".")[2]) for name in names]
    assert layers == sorted(layers) and set(layers) == set(range(9))


def megatron_like(arch, spelling: int = 0) -> torch.nn.Module:
    """A module tree with the names of the table, in one of their spellings, and nothing of Megatron."""
    root = torch.nn.Module()
    for entry in model_entries(arch):
        name = entry.megatron[min(spelling, len(entry.megatron) - 1)]
        parent = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(leaf, torch.nn.Parameter(torch.empty(entry.full_shape, device="meta")))
    for index, layer in root.decoder.layers.named_children():
        layer.layer_number = int(index) + 1
    root.decoder.layers = torch.nn.ModuleList(root.decoder.layers.children())
    return root


@pytest.mark.parametrize("arch", [full_architecture(mtp=1), qwen2_architecture(tied=False)], ids=["deepseek_v3", "qwen2"])
@pytest.mark.parametrize("spelling", [0, 1])
def test_both_spellings_are_found(spelling, arch):
    """Separate and fused norms, sequential and grouped experts."""
    local = local_weights([megatron_like(arch, spelling)], arch, OneRank())
    assert sorted(local.tensors) == list(range(len(model_entries(arch))))


def test_layer_numbers_are_global():
    """The second half of a pipeline calls its first layer 0."""
    arch = full_architecture(mtp=0)
    module = megatron_like(arch)
    module.decoder.layers = module.decoder.layers[3:]
    local = local_weights([module], arch, OneRank())
    held = {local.entries[i].name for i in local.tensors}
    assert "model.layers.4.self_attn.o_proj.weight" in held and "model.layers.0.self_attn.o_proj.weight" not in held


def test_what_does_not_fit_is_named():
    arch = full_architecture(mtp=0)
    unknown = megatron_like(arch)
    unknown.decoder.layers[2].mlp.register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ConversionError, match=r"decoder.layers.2.mlp.bias has no Hugging Face counterpart"):
        local_weights([unknown], arch, OneRank())
    misshapen = megatron_like(arch)
    misshapen.decoder.final_layernorm.weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ConversionError, match=r"decoder.final_layernorm.weight has shape \[3\], expected \[64\]"):
        local_weights([misshapen], arch, OneRank())
    with pytest.raises(ConversionError, match="is there twice"):
        local_weights([megatron_like(arch), megatron_like(arch)], arch, OneRank())
