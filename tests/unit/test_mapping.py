"""The table reproduces the published checkpoint and accounts for every tensor."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.errors import ConversionError
from megatron_r1.model.presets import PRESETS
from megatron_r1.weights.groups import OneRank
from megatron_r1.weights.local import local_weights
from megatron_r1.weights.mapping import hf_shapes, model_entries
from tests.random_weights import full_architecture


def test_published_checkpoint_is_reproduced():
    """Counts of the DeepSeek-R1 files: 91,991 tensors and 684,531,386,000 elements with the scales of fp8 matrices."""
    shapes = hf_shapes(PRESETS["671b"])
    scaled = [s for name, s in shapes.items() if name.endswith("_proj.weight") and "eh_proj" not in name or "with_mqa" in name]
    scales = [math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in scaled]
    assert len(shapes) + len(scales) == 91_991
    assert sum(map(math.prod, shapes.values())) + sum(scales) == 684_531_386_000
    main = sum(math.prod(s) for name, s in shapes.items() if not name.startswith("model.layers.61."))
    assert main == 671_026_419_200


@pytest.mark.parametrize("preset", PRESETS)
def test_every_name_is_there_once(preset):
    entries = model_entries(PRESETS[preset])
    for names in ([n for e in entries for n in e.megatron], [n for e in entries for n in (*e.hf, *e.copies)]):
        assert len(names) == len(set(names))


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


@pytest.mark.parametrize("spelling", [0, 1])
def test_both_spellings_are_found(spelling):
    """Separate and fused norms, sequential and grouped experts."""
    arch = full_architecture(mtp=1)
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
