"""vLLM loads an exported folder of every architecture, has transformers' log-probs, and is updated exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from megatron_r1.errors import DeviceError, WeightSyncError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.families.qwen2 import Qwen2
from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout import vllm_client as process
from megatron_r1.rollout.channel.local import EngineProcess
from megatron_r1.rollout.prompt_queue import Taken
from megatron_r1.runtime.launch import child_environment
from tests.pipeline.engine_cases import (
    SAMPLING,
    FolderOptions,
    check_corruptions,
    check_held_tensors,
    difference_to_transformers,
    options,
    prompts,
    sampled,
)
from tests.random_weights import further_families, llama_architecture, random_source, random_weights, write_random_model


def qwen2(tied: bool) -> Qwen2:
    """vLLM's qwen2 takes no head_dim; its kernels on CPU want at least 32. The default rope_theta of neither library."""
    return Qwen2(
        vocab_size=450, hidden_size=128, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, rope_theta=500.0, tie_word_embeddings=tied,
    )  # fmt: skip


ARCHITECTURES = {
    "deepseek_v3": PRESETS["tiny"],
    "qwen2 untied": qwen2(tied=False),
    "qwen2 tied": qwen2(tied=True),
    "llama": llama_architecture(),
    **further_families(),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A process that imports vLLM once for all engines of this file."""
    log = tmp_path_factory.mktemp("host") / "engine.log"
    environment = child_environment() | process.engine_environment("cpu", 1)
    host = EngineProcess("tests.pipeline.folder_host", log, environment)
    yield host
    host.close(patience=0)  # vLLM takes seconds to leave by itself


def start(
    host: EngineProcess, arch: Architecture, folder: Path, vllm_version: str | None = None, **changes: object
) -> process.VllmProcessEngine:
    """An engine in the host, with the folder's weights. Closing it leaves the host alone."""
    corruptible = replace(options(arch), worker_extension="tests.pipeline.corrupting_worker.CorruptingWorker", **changes)
    child = SimpleNamespace(call=host.call, close=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "EngineProcess", lambda *_: child)
        engine_options = FolderOptions(**vars(corruptible), folder=folder, vllm_version=vllm_version)
        return process.VllmProcessEngine(engine_options, str, {}, host.log_path)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, host, tmp_path_factory):
    """An engine with the weights of seed 0 from a folder, and what it samples from them before any update."""
    arch = ARCHITECTURES[request.param]
    folder = write_random_model(tmp_path_factory.mktemp("folder") / "model", arch)
    engine = start(host, arch, folder)
    engine.version = 0  # from the folder
    groups = engine.generate(prompts(arch), SAMPLING, seed=5)
    yield SimpleNamespace(arch=arch, folder=folder, engine=engine, groups=groups)
    engine.close()


def test_logprobs_are_those_of_transformers(served):
    cooler = replace(SAMPLING, temperature=0.7)
    for temperature, groups in ((1.0, served.groups), (0.7, served.engine.generate(prompts(served.arch), cooler, seed=1))):
        difference = difference_to_transformers(served.folder, groups, temperature)
        assert len(difference) > 256 and difference.mean() < 1e-5 and difference.max() < 1e-3
        logprobs = torch.tensor([p for _, row in sampled(groups) for p in row])
        assert logprobs.std() > 0.5, "the distributions are flat: the comparison would show nothing"


def test_update_equals_the_folder(served):
    """Other weights and back: exactly what vLLM computed from the folder before any update."""
    engine, arch = served.engine, served.arch
    report = engine.load_weights(random_source(arch, 1), version=1)
    assert report.num_verified == report.num_tensors == sum(1 for _ in random_weights(arch, 1))
    assert sampled(engine.generate(prompts(arch), SAMPLING, seed=5)) != sampled(served.groups)
    engine.load_weights(random_source(arch, 0), version=2)
    assert sampled(engine.generate(prompts(arch), SAMPLING, seed=5)) == sampled(served.groups)
    check_held_tensors(engine, arch)


@pytest.mark.parametrize("served", ["deepseek_v3", "qwen2 untied"], indirect=True)
def test_an_update_takes_no_memory_beside_the_bucket(served):
    """Not even a module's experts at a time: less than two tensors, where one bucket holds the whole model."""
    call, arch = served.engine._call, served.arch
    sizes = [tensor.nbytes for _, tensor in random_weights(arch, 0)]
    assert sum(sizes) < served.engine.options.bucket_bytes
    served.engine.load_weights(random_source(arch, 1), version=1)
    call("call_workers", "measure_buckets")
    served.engine.load_weights(random_source(arch, 0), version=2)
    (most,) = call("call_workers", "measured_bytes")
    assert 0 < most < 2 * max(sizes) < sum(sizes) / 2


#: (parameter, row) -> the tensor to be named. qwen2 has 128 rows of query, then 64 of key and 64 of value.
CORRUPTIONS = {
    ("model.embed_tokens.weight", None): "different: model.embed_tokens.weight$",
    ("lm_head.weight", None): "different: lm_head.weight$",
    ("model.norm.weight", None): "different: model.norm.weight$",
    ("model.layers.1.self_attn.qkv_proj.weight", 127): "different: model.layers.1.self_attn.q_proj.weight$",
    ("model.layers.1.self_attn.qkv_proj.weight", 128): "different: model.layers.1.self_attn.k_proj.weight$",
    ("model.layers.1.self_attn.qkv_proj.weight", 192): "different: model.layers.1.self_attn.v_proj.weight$",
    ("model.layers.2.self_attn.qkv_proj.bias", 127): "different: model.layers.2.self_attn.q_proj.bias$",
    ("model.layers.2.self_attn.qkv_proj.bias", 191): "different: model.layers.2.self_attn.k_proj.bias$",
    ("model.layers.2.self_attn.qkv_proj.bias", 255): "different: model.layers.2.self_attn.v_proj.bias$",
    ("model.layers.0.self_attn.o_proj.weight", None): "different: model.layers.0.self_attn.o_proj.weight$",
    ("model.layers.0.mlp.gate_up_proj.weight", 95): "different: model.layers.0.mlp.gate_proj.weight$",
    ("model.layers.0.mlp.gate_up_proj.weight", 96): "different: model.layers.0.mlp.up_proj.weight$",
    ("model.layers.0.mlp.down_proj.weight", None): "different: model.layers.0.mlp.down_proj.weight$",
    ("model.layers.0.post_attention_layernorm.weight", None): "different: model.layers.0.post_attention_layernorm.weight$",
    ("model.layers.0.self_attn.rotary_emb.cos_sin_cache", None): "changed constants: .*cos_sin_cache$",
}


@pytest.mark.parametrize("served", ["qwen2 untied"], indirect=True)
def test_one_flipped_bit_is_named(served):
    """In every fused part of a dense model, weights and biases. (For V3 see test_vllm_engine.)"""
    check_corruptions(served.engine, served.arch, CORRUPTIONS)


@pytest.mark.parametrize("served", ["qwen2 tied"], indirect=True)
def test_tied_output_layer_that_came_loose_is_named(served):
    """The output layer is compared as a copy of the embedding; here it kept the values of an earlier update."""
    served.engine.load_weights(random_source(served.arch, 0), version=3)
    served.engine._call("call_workers", "untie")  # spoils the engine
    with pytest.raises(WeightSyncError, match="copy that is not updated: model.embed_tokens.weight$"):
        served.engine.load_weights(random_source(served.arch, 1), version=4)


@pytest.mark.parametrize("served", ["qwen2 untied", "deepseek_v3"], indirect=True)
def test_prompts_that_fill_more_than_a_step_are_sampled_as_they_are_in_several(served):
    """vLLM cuts the prompt that does not fit a step of 4,096 tokens, and a draw in the middle of a prompt must not count."""
    asked, sampling = prompts(served.arch, 256), replace(SAMPLING, max_tokens=3)
    assert sum(len(prompt.token_ids) for prompt in asked) > 4096 + 32
    whole = sampled(served.engine.generate(asked, sampling, seed=11))
    halves = {}
    for half in (range(128), range(128, 256)):
        halves |= served.engine.sample(asked, sampling, 11, lambda _, half=half: Taken(list(half), is_last=True))
    apart = sampled([halves[position] for position in range(256)])
    assert [tokens for tokens, _ in whole] == [tokens for tokens, _ in apart]


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_rope_scaling_matters_at_the_tested_length(served, tmp_path):
    """Without it transformers' log-probs are others, so the agreement above shows that vLLM scales as transformers does."""
    unscaled = served.arch.model_copy(update={"rope_scaling": None})
    difference = difference_to_transformers(write_random_model(tmp_path / "model", unscaled), served.groups, 1.0)
    assert difference.mean() > 1e-2


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_every_end_of_sequence_and_every_stop_text_ends_a_response(served, host):
    """The same samples up to the first of two tokens or of two texts that now end them; log-probs belong to what stays."""
    rows = [ids for ids, _ in sampled(served.groups)]
    longest, other = sorted(rows, key=len)[-1:-3:-1]
    also = next(token for token in longest[2:] if token != longest[0])
    texts = f"{other[4]}.w{other[5]}", "no such text"  # from the middle of a token into the next one
    missing = next(token for token in longest if token not in (1, also, *other[4:6]))
    vocabulary = word_tokenizer(served.arch.vocab_size, missing)
    engine = start(host, served.arch, served.folder, end_token_ids=(1, also), stop=texts, tokenizer_json=vocabulary)
    engine.version = 0
    by_text = 0
    for before, after in zip(
        sampled(served.groups), groups := engine.generate(prompts(served.arch), SAMPLING, seed=5), strict=True
    ):
        said = ["".join(f"w{token}." for token in before[0][: i + 1]) for i in range(len(before[0]))]
        cut = next(
            (i + 1 for i, token in enumerate(before[0]) if token in (1, also) or texts[0] in said[i]),
            len(before[0]),
        )
        (rollout,) = after.rollouts
        ids = rollout.token_ids.tolist()
        is_stopped = ids[-1] not in (1, also) and texts[0] in said[cut - 1]
        assert ids == before[0][:cut] and rollout.finished == (is_stopped or ids[-1] in (1, also))
        assert rollout.rollout_logprobs.tolist() == pytest.approx(before[1][:cut], abs=1e-5)
        assert rollout.text == str(ids[:-1] if rollout.finished and not is_stopped else ids)
        by_text += is_stopped
    assert by_text and any(rollout.token_ids[-1] == also for group in groups for rollout in group.rollouts)
    engine.close()


def word_tokenizer(size: int, missing: int) -> str:
    """A tokenizer.json whose token 7 is "w7."; one id has no token, as those have none to which a vocabulary is padded."""
    words = {f"w{token}.": token for token in range(size) if token != missing}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0."))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()


def test_another_vllm_is_refused(host, tmp_path):
    with pytest.raises(DeviceError, match="vllm 0.33.0 is installed but megatron_r1 was written for 0.32.0"):
        start(host, PRESETS["tiny"], tmp_path, vllm_version="0.33.0")
