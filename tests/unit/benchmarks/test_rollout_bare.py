"""The comparison with bare vLLM, without vLLM: that both sides are asked for the same, and what counts as fast enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure, rollout
from benchmarks.against_trl.workloads import WORKLOADS
from benchmarks.measure import Comparison, Disagreement, Side
from benchmarks.rollout_bare import (
    PROMPT_TOKENS,
    BareResult,
    bare_job,
    cache_bytes,
    check_same,
    make_prompts,
    matrix_speed,
    multiplied_weights,
    our_options,
    rollout_flops,
)
from megatron_r1.rollout.cache_size import sequence_bytes
from megatron_r1.rollout.vllm_client import response_seed
from megatron_r1.types import Sampling

SMOLLM2, TINY = WORKLOADS["smollm2"], WORKLOADS["tiny"]


@pytest.mark.parametrize("workload", [SMOLLM2, TINY], ids=["smollm2", "tiny"])
def test_bare_vllm_is_asked_for_the_same_responses(workload, tmp_path: Path) -> None:
    cache = cache_bytes(workload.arch, 64, PROMPT_TOKENS + workload.tokens)
    options = our_options(workload, 64, eos_id=1)
    prompts = make_prompts(workload, 4, seed=3)
    job = bare_job(tmp_path, options, prompts, Sampling(2, 1.0, 1.0, workload.tokens), 3, "compiled")
    engine: dict[str, Any] = job["engine"]
    assert (engine["kv_cache_memory_bytes"], engine["dtype"], engine["max_model_len"]) == (cache, "float32", 80)
    assert engine["max_num_seqs"] == options.max_num_seqs and engine["logprobs_mode"] == "processed_logprobs"
    assert "block_size" not in engine and "async_scheduling" not in engine, "bare vLLM's own choice"
    assert engine["enforce_eager"] is False
    assert bare_job(tmp_path, options, prompts, Sampling(2, 1.0, 1.0, 32), 3, "eager")["engine"]["enforce_eager"] is True
    assert ("attention_backend" in engine) == (workload is TINY)
    assert engine.get("max_num_batched_tokens") == (None if workload is TINY else 4096), "bare vLLM's own"
    many = bare_job(tmp_path, options, prompts, Sampling(64, 1.0, 1.0, workload.tokens), 3, "compiled")["engine"]
    if workload is SMOLLM2:
        assert many["max_num_batched_tokens"] == 64 * sum(len(ids) for ids in job["prompts"]) > 4096
    assert job["prompts"] == [list(prompt.token_ids) for prompt in prompts] and job["tokens"] == workload.tokens
    assert job["seeds"] == [[response_seed(3, at, 0), response_seed(3, at, 1)] for at in range(4)]
    assert all(PROMPT_TOKENS // 2 <= len(ids) <= PROMPT_TOKENS for ids in job["prompts"])


def test_the_cache_has_room_for_all_with_the_blocks_of_either_side() -> None:
    of_token = sequence_bytes(SMOLLM2.arch, "float32", 32) // 32
    assert cache_bytes(SMOLLM2.arch, 64, 80) == (64 + 1) * 128 * of_token
    assert cache_bytes(SMOLLM2.arch, 64, 129) == (2 * 64 + 1) * 128 * of_token
    assert cache_bytes(TINY.arch, 64, 80) > 64 * sequence_bytes(TINY.arch, "float32", 80)


def test_the_operations_are_those_of_the_weights_that_a_token_meets() -> None:
    body, head = multiplied_weights(SMOLLM2.arch)
    assert body == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) and head == 49152 * 576
    assert rollout_flops(SMOLLM2.arch, [10, 20], 8, 32) == 2 * (body * (30 + 2 * 8 * 32) + head * 2 * 8 * 32)
    arch = TINY.arch
    sparse, _ = multiplied_weights(arch)
    more, _ = multiplied_weights(arch.model_copy(update={"num_experts_per_tok": arch.num_experts_per_tok + 1}))
    assert more - sparse == pytest.approx(3 * arch.hidden_size * arch.moe_intermediate_size * (arch.num_hidden_layers - 1))
    assert matrix_speed(1) > 1e8


def test_responses_that_are_not_the_same_are_not_compared() -> None:
    rows = [[n, n + 1] for n in range(10)]
    assert check_same(rows, rows) == 1.0
    assert check_same([[0, 9], *rows[1:]], rows) == 0.95, "later tokens may part where two logits are nearly alike"
    assert check_same([[7, 1], *rows[1:]], rows) == 0.95
    with pytest.raises(Disagreement, match="only 80% begin with the same token"):
        check_same([[7, 1], [7, 1], *rows[2:]], rows)
    with pytest.raises(Disagreement, match="different lengths"):
        check_same([[0], *rows[1:]], rows)


def result(ours: float, bare: float) -> BareResult:
    def side(seconds: float) -> Side:
        return Side([100], [seconds], [seconds])

    return BareResult(Comparison("case", side(ours), side(bare)), cpu_ratio=1.0, same_tokens=1.0, possible=1000.0)


@pytest.mark.parametrize(("seconds", "code"), [((1.0, 1.0), 0), ((1.0, 0.951), 0), ((1.0, 0.949), 1), ((2.0, 1.0), 1)])
def test_the_command_fails_below_the_bar_after_all_is_printed_and_written(monkeypatch, tmp_path, capsys, seconds, code) -> None:
    asked: list[tuple[str, str]] = []

    def compare(case: str, how: str, *_: object) -> BareResult:
        asked.append((case, how))
        return result(*seconds) if len(asked) == 1 else result(1.0, 1.0)

    monkeypatch.setattr(rollout, "compare_with_bare", compare)
    out = tmp_path / "out.json"
    arguments = rollout.parse_arguments(["--only-bare", "--cases", "tiny-64", "--out", str(out)])
    assert measure.run(rollout.benchmark, arguments) == code
    assert asked == [("tiny-64", "compiled"), ("tiny-64", "eager")] and out.is_file()
    output = capsys.readouterr()
    assert "of 1,000 tokens/s" in output.out and ("below 0.95 of bare vLLM's" in output.err) == bool(code)
