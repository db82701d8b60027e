"""Every parallel layout trains the same model: three fp32 steps agree with one rank's.

All layouts of one world size share one set of processes, because starting them costs more than training.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from megatron_r1.runtime.kept_tokens import TokenColumns
from megatron_r1.runtime.launch import free_port
from tests.balance_cases import compare
from tests.random_weights import further_families
from tests.ranks import run_ranks

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # absolute; relative


def case(
    name: str, mtp: bool = False, packed: bool = False, recompute: str = "none", model: str = "deepseek_v3", te: bool = False,
    megatron: dict | None = None, tiles: bool = False, **parallel: int,
) -> dict:  # fmt: skip
    """One layout with one way of training, and switches of Megatron-Core's; with `tiles`, without whole logits."""
    suffix = "".join(
        ["-mtp" * mtp, "-packed" * packed, f"-{recompute}" * (recompute != "none"), f"-{model}" * (model != "deepseek_v3")]
        + ["-te" * te, "-tiles" * tiles, *(f"-{name}={value}" for name, value in (megatron or {}).items())]
    )
    ways = {
        "mtp": mtp,
        "packed": packed,
        "recompute": recompute,
        "model": model,
        "te": te,
        "megatron": megatron or {},
        "tiles": tiles,
    }
    return {"name": name + suffix, **ways, "parallel": parallel}


#: qwen2 has grouped heads, biases and tied embeddings, whose two copies under pipeline parallelism share one gradient.
DENSE_WAYS = [{"model": "qwen2", "packed": packed} for packed in (False, True)]
WAYS = [*({"mtp": mtp, "packed": packed} for mtp in (False, True) for packed in (False, True)), *DENSE_WAYS]
FURTHER = [{"model": model} for model in further_families()]
REFERENCES = [case("one", **way) for way in WAYS + FURTHER]

ONE_RANK = [
    case("one", recompute="full"),
    case("one", recompute="full", mtp=True, packed=True),
    case("one", recompute="selective"),
    case("one", recompute="selective", mtp=True, packed=True),
    case("one", mtp=True, packed=True, tiles=True),
]

TWO_RANKS = [
    *[case("dp2", **way) for way in WAYS],
    *[case("tp2", tp=2, **way) for way in WAYS],
    *[case("pp2", pp=2, **way) for way in WAYS],
    *[case("pp2-vpp2", pp=2, vpp=2, **way) for way in WAYS],
    *[case("ep2", ep=2, **way) for way in WAYS if way not in DENSE_WAYS],
    *[case("cp2", cp=2, **way) for way in WAYS],
    case("tp2", tp=2, recompute="full"),
    case("tp2", tp=2, recompute="selective", packed=True),
    case("pp2", pp=2, recompute="full", mtp=True),
    case("ep2", ep=2, recompute="full"),
    case("pp2", pp=2, recompute="full", model="qwen2"),
    *[case("tp2", tp=2, te=True, **way) for way in (WAYS[3], DENSE_WAYS[0])],
    *[case("tp2", tp=2, **way) for way in FURTHER],
    *[case("pp2-vpp2", pp=2, vpp=2, **way) for way in FURTHER],
]  # fmt: skip

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TWO_RANKS += [
    case("dp2", mtp=True, megatron=OVERLAP),
    case("dp2", packed=True, megatron={"overlap_grad_reduce": True}),
    case("ep2", ep=2, mtp=True, packed=True, megatron=OVERLAP),
    case("pp2-vpp2", pp=2, vpp=2, megatron=OVERLAP),
    case("pp2", pp=2, mtp=True, megatron={"pipeline_model_parallel_layout": "Et|t*4mL"}),
    case("pp2-vpp2", pp=2, vpp=2, mtp=True, megatron={"pipeline_model_parallel_layout": "E|(tt|)*2tmL"}),
    case("pp2", pp=2, packed=True, megatron={"batch_p2p_comm": False}),
    case("tp2", tp=2, megatron={"bias_swiglu_fusion": True}),
    case("dp2", mtp=True, megatron=OVERLAP, tiles=True),  # its weights are waited for where the output layer is called
    case("tp2", tp=2, mtp=True, packed=True, tiles=True),
    case("tp2", tp=2, model="qwen2", tiles=True),
    case("pp2-vpp2", pp=2, vpp=2, model="qwen2", packed=True, tiles=True),
    case("cp2", cp=2, tiles=True),
]

FOUR_RANKS = [
    *[case("tp2-ep2", tp=2, ep=2, **way) for way in (WAYS[0], WAYS[3])],
    *[case("pp2-ep2", pp=2, ep=2, **way) for way in (WAYS[0], WAYS[3])],
    *[case("tp2-pp2", tp=2, pp=2, **way) for way in (WAYS[0], WAYS[3], WAYS[-1])],
    case("tp2-ep2-etp2", tp=2, ep=2, etp=2),
    case("tp2-pp2-ep2", tp=2, pp=2, ep=2, mtp=True, packed=True),
    case("tp2-cp2", tp=2, cp=2),
    case("tp2-cp2", tp=2, cp=2, mtp=True),
    case("tp2-cp2", tp=2, cp=2, packed=True),
    case("tp2-dp2", tp=2, packed=True, recompute="selective"),
    case("pp2-dp2", pp=2, mtp=True, megatron=OVERLAP),
    case("tp2-ep2", tp=2, ep=2, mtp=True, megatron=OVERLAP),  # experts have data-parallel ranks, and buffers, of their own
]  # fmt: skip


#: One batch with balance loss, moving biases and multi-token prediction: layouts and the tokens of a micro-batch.
ONE_UPDATE = {
    1: [{"stage": stage, "micro_batch_tokens": 80} for stage in ("sft", "grpo", "reward_model")],
    2: [
        *[{"stage": "sft", "micro_batch_tokens": 64, **sizes} for sizes in ({}, {"ep": 2}, {"tp": 2}, {"pp": 2})],
        {"stage": "sft", "micro_batch_tokens": 200},
        {"stage": "sft", "micro_batch_tokens": 100, "pp": 2, "vpp": 2, "recompute": "selective"},
        {"stage": "grpo", "micro_batch_tokens": 64, "ep": 2, "recompute": "full"},
        {"stage": "grpo", "micro_batch_tokens": 200, "tp": 2, "recompute": "selective"},
        {"stage": "reward_model", "micro_batch_tokens": 80},
        *[{"stage": stage, "micro_batch_tokens": 80, "cp": 2} for stage in ("sft", "reward_model")],
        {"stage": "grpo", "micro_batch_tokens": 200, "cp": 2, "recompute": "full"},
        {"stage": "reward_model", "micro_batch_tokens": 200, "tp": 2, "ep": 2},
    ],
    4: [
        *[{"stage": "sft", "micro_batch_tokens": 64, **sizes, "ep": 2} for sizes in ({"tp": 2}, {"pp": 2})],
        {"stage": "sft", "micro_batch_tokens": 64, "cp": 4},
        {"stage": "grpo", "micro_batch_tokens": 64, "tp": 2, "cp": 2},
    ],
}


#: Rounds of GRPO: the layout, and the ranks that sample. The first on one rank is what others are compared with; the second, those
#: that compute a prompt once for its responses.
ROUNDS: dict[int, list[tuple[dict[str, int], list[int]]]] = {
    1: [({}, [0]), ({"share_prompts": 0}, [0])],
    2: [
        *[({}, [0, 1]), ({"pp": 2}, [1]), ({"tp": 2}, [1, 0]), ({"cp": 2}, [1])],
        *[({"share_prompts": 1}, [0, 1]), ({"tp": 2, "share_prompts": 1}, [0]), ({"cp": 2, "share_prompts": 1}, [0])],
    ],
    4: [({}, [3, 1, 2]), ({"tp": 2}, [0, 3]), ({"pp": 2, "ep": 2}, [2, 1]), ({"pp": 2, "cp": 2}, [1, 2])],
}


@cache
def run_all(world_size: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Results of all cases of this world size: of some steps, and of one update."""
    cases = {1: REFERENCES + ONE_RANK, 2: TWO_RANKS, 4: FOUR_RANKS}[world_size]
    rounds = {str(one): one for one in ROUNDS[world_size]}
    asked = {"train": cases, "one_update": {str(model): model for model in ONE_UPDATE[world_size]}, "rounds": rounds}
    with TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        script = Path(__file__).with_name("train_layouts.py")
        run_ranks(script, world_size, free_port(), json.dumps(asked), results, timeout=600)
        return json.loads(results.read_text()), torch.load(results.with_suffix(".pt"))


def train(world_size: int) -> dict[str, list[dict[str, Any]]]:
    """Loss, gradient norm and biases of every step of all cases of this world size."""
    return run_all(world_size)[0]


def reference_of(one: dict) -> list[dict[str, Any]]:
    """One rank, without recomputation, trained the same way."""
    return train(1)[case("one", mtp=one["mtp"], packed=one["packed"], model=one["model"])["name"]]


@pytest.mark.parametrize(
    ("world_size", "one"),
    [(1, c) for c in ONE_RANK] + [(2, c) for c in TWO_RANKS] + [(4, c) for c in FOUR_RANKS],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
def test_layout_agrees_with_one_rank(world_size: int, one: dict) -> None:
    for got, want in zip(train(world_size)[one["name"]], reference_of(one), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=LOSS_TOLERANCE)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=GRAD_NORM_TOLERANCE)
        assert got["biases"] == want["biases"]


@pytest.mark.parametrize(
    ("world_size", "model"), [(n, model) for n in (2, 4) for model in ONE_UPDATE[n]], ids=lambda value: str(value)
)
def test_one_batch_under_any_layout_and_packing(world_size: int, model: dict[str, Any]) -> None:
    """Gradient, norm, biases, balance loss and multi-token-prediction loss are those of one rank with other micro-batches."""
    alone = next(one for one in ONE_UPDATE[1] if one["stage"] == model["stage"])
    compare(run_all(world_size)[1][str(model)], run_all(1)[1][str(alone)])


@pytest.mark.parametrize(("world_size", "one"), [(n, one) for n in (2, 4) for one in ROUNDS[n]], ids=lambda value: str(value))
def test_a_round_is_the_same_whoever_samples_and_trains(world_size: int, one: tuple[dict[str, int], list[int]]) -> None:
    """Metrics of a step are one rank's, to the last digit where they are of the responses; rollouts/ is the same file."""
    got, want = run_all(world_size)[0]["rounds"][str(one)], run_all(1)[0]["rounds"][str(ROUNDS[1]["share_prompts" in one[0]])]
    tokens, expected_tokens = ([line["tokens"] for line in found["rollouts"]] for found in (got, want))
    lines, expected_lines = ([line | {"tokens": None} for line in found["rollouts"]] for found in (got, want))
    assert lines == expected_lines and len(expected_lines) == 48
    for mine, other in zip(tokens, expected_tokens, strict=True):
        assert (mine["ids"], mine["engine"]) == (other["ids"], other["engine"]), "of whoever sampled"
        of_trainer = TokenColumns.from_json(mine).difference, TokenColumns.from_json(other).difference
        assert of_trainer[0] == pytest.approx(of_trainer[1], rel=2e-3, abs=1e-4), "of whoever trained, at its response"
    for line, expected in zip(got["metrics"], want["metrics"], strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith(("reward/", "response", "step", "updates", "lr")):
                assert line[name] == value, name
            assert line[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    assert any(0 < line.get("reward/outcome/format/timeout", 0) < 1 for line in want["metrics"]), "some have no score"
    assert got["weights"] == pytest.approx(want["weights"], rel=1e-4, abs=2e-3)


def test_reference_trains() -> None:
    """The comparison means something: losses and gradient norms move and differ between the ways of training."""
    for one in REFERENCES:
        steps = train(1)[one["name"]]
        assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0.01 for step in steps)
    first_norms = {round(train(1)[one["name"]][0]["grad_norm"], 5) for one in REFERENCES}
    assert len(first_norms) == len(REFERENCES)
