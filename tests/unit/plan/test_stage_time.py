"""The time of a stage as its config asks for it: which phases it has, what waits for what, and what a setting changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError
from megatron_r1.plan.decode_time import Engine, cache_tokens, sampling
from megatron_r1.plan.engine import engine_weights
from megatron_r1.plan.job import Job, Stage, read_job
from megatron_r1.plan.lengths import ResponseLengths
from megatron_r1.plan.stage_time import NOTHING_SAID, Assumed, TimePlan, grid_of, plan_time, shards_of, training_of
from megatron_r1.plan.terms import Term, TimePhase
from megatron_r1.plan.transfer_time import TRANSFER_COSTS, SentShards
from megatron_r1.plan.work import model_work
from tests.paths import ROOT

V3 = ROOT / "examples/v3_671b"


def job(name: str, stage: Stage, *settings: str, gpu: str = "H800", nodes: int = 64) -> Job:
    return read_job(load_config(V3 / f"{name}.yaml", list(settings)), stage, gpu, nodes)


FEW = "grpo.prompts_per_rollout=32"  # of which a round is played sooner


def timed(asked: Job, assumed: Assumed = NOTHING_SAID) -> TimePlan:
    plan = plan_time(asked, assumed)
    assert plan is not None
    return plan


def seconds(plan: TimePlan) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in plan.phases}


@pytest.fixture(scope="module")
def zero() -> TimePlan:
    return timed(job("r1_zero", "grpo"), Assumed(response=8192))


def test_a_round_at_512_ranks(zero: TimePlan) -> None:
    found = seconds(zero)
    assert list(found) == ["sampling", "log-probs", "update", "weight sync", "save", "between rounds"]
    assert {phase.name: phase.waits_for for phase in zero.phases}["between rounds"] == ("weight sync", "save")
    assert zero.seconds == pytest.approx(sum(found.values()) - found["save"])
    assert (zero.unit, zero.devices, zero.units) == ("round", 512, 650)
    assert zero.tokens == 8192 * (8192 + 160)
    assert zero.stage_seconds == 650 * zero.seconds
    assert max(found, key=lambda name: found[name]) == "sampling" and 0 < zero.mfu < 0.4
    longest = zero.phases[0].largest()
    assert longest is not None and longest.name == "decode, short of cache"
    assert longest.setting == "rollout.gpu_memory_utilization"


def test_longer_responses_take_longer_by_the_schedule(zero: TimePlan) -> None:
    early, later = (timed(job("r1_zero", "grpo", FEW), Assumed(response=8192, updates_done=done)) for done in (0, 8200))
    assert "cut at 65,536" in later.assumptions[0] and "cut at 32,768" in zero.assumptions[0]
    assert seconds(later)["sampling"] > seconds(early)["sampling"]


def test_reward_models_score_between_sampling_and_log_probs() -> None:
    plan = timed(job("stage4", "grpo", FEW))
    waits = {phase.name: phase.waits_for for phase in plan.phases}
    assert waits["reward"] == ("sampling",) and waits["log-probs"] == ("reward",)


def test_without_reference_and_with_one_update_nothing_is_scored() -> None:
    one = job("r1_zero", "grpo", FEW, "grpo.kl_coef=0")
    assert "log-probs" not in seconds(timed(one))


def test_epochs_multiply_updates() -> None:
    once, twice = (seconds(timed(job("r1_zero", "grpo", FEW, f"grpo.inner_epochs={epochs}"))) for epochs in (1, 2))
    assert 1.7 < twice["update"] / once["update"] < 2.1 and twice["sampling"] == once["sampling"]


def test_engines_on_nodes_of_their_own_cost_their_hours() -> None:
    apart = job("r1_zero", "grpo", FEW, "rollout.placement=disaggregated", "rollout.servers=x", "rollout.nodes_per_engine=4",
                "rollout.gpu_memory_utilization=0.9", "rollout.tensor_parallel_size=32", "rollout.sleep=false")  # fmt: skip
    plan = timed(apart, Assumed(engine_nodes=32))
    assert plan.devices == 512 + 256
    with pytest.raises(ConfigError, match="2 node.s. of 8 hold no engine; raise --engine-nodes"):
        plan_time(apart, Assumed(engine_nodes=2))


def test_engines_without_room_are_told() -> None:
    with pytest.raises(ConfigError, match="rollout.gpu_memory_utilization=0.31 leaves an engine's cache no room"):
        plan_time(job("r1_zero", "grpo", "rollout.gpu_memory_utilization=0.31"))


def test_pretraining_sums_its_phases() -> None:
    plan = timed(job("pretrain", "pretrain", nodes=256))
    assert [note.split(":")[0] for note in plan.assumptions] == ["phase 0", "phase 1", "phase 2"]
    assert plan.tokens == 15360 * 4096 and plan.units is not None and plan.stage_seconds is not None
    assert plan.stage_seconds < plan.units * plan.seconds * 1.02, "a ramp of batches begins with small ones"


@pytest.mark.parametrize(("name", "stage"), [("stage3", "sft"), ("reward_helpful", "reward-model")])
def test_updates_on_samples(name: str, stage: Stage) -> None:
    asked = job(name, stage)
    plan = timed(asked)
    assert list(seconds(plan)) == ["update", "save"] and plan.units is None
    pairs = 2 if stage == "reward-model" else 1
    assert plan.tokens == pytest.approx(asked.section.batch_size * pairs * 5355)


def test_rejection_sampling_is_sampling_alone() -> None:
    plan = timed(job("stage3_data", "rejection"))
    assert list(seconds(plan)) == ["sampling"] and plan.unit == "batch of 64 prompts"


def test_a_conversion_has_no_time_and_a_cpu_no_device() -> None:
    assert plan_time(job("r1_zero", "convert")) is None
    with pytest.raises(ConfigError, match="give --gpu NAME"):
        plan_time(read_job(load_config(V3 / "r1_zero.yaml", ["runtime.device=cpu"]), "grpo", "cpu", 64))


def test_switches_reach_the_times() -> None:
    plain = job("pretrain", "pretrain", "runtime.recompute=selective", nodes=256)
    work = model_work(plain.arch)
    assert plain.device is not None
    training = training_of(plain, work, plain.device)
    assert training.mtp and 0 < training.recompute < 0.2, "norms and up-projections of latent attention"
    assert training.whole_logits == 256e6, "as the output layer has it where its logits go by tiles"
    fused = job("pretrain", "pretrain", "megatron.cross_entropy_loss_fusion=true", nodes=256)
    assert training_of(fused, work, plain.device).whole_logits == math.inf
    full = job("pretrain", "pretrain", "runtime.recompute=full", nodes=256)
    assert training_of(full, work, plain.device).recompute == 1
    fp8 = timed(job("pretrain", "pretrain", "megatron.fp8=e4m3", nodes=256))
    assert fp8.seconds < timed(job("pretrain", "pretrain", "megatron.fp8=null", nodes=256)).seconds
    assert (grid_of(plain.layout).dp, grid_of(plain.layout).ep) == (plain.layout.dp, plain.layout.ep)


def test_weights_travel_as_shards(zero: TimePlan) -> None:
    """671B on 512 ranks, 8 engines of 64 on 8 nodes each: the rank that feeds a node's workers gets 8/64 of the model over TCP."""
    asked = job("r1_zero", "grpo")
    whole, shard = (engine_weights(asked.arch, size, 2) for size in (1, 64))
    shards = shards_of(asked, 8)
    assert shards == SentShards(shard, whole * 8 / 512, 8, 63 / 64, through_host=True, verified=True, wakes=True)
    (parts,) = (phase.terms for phase in zero.phases if phase.name == "weight sync")
    assert parts[-1].name == "travel" and parts[-1].amount == pytest.approx(8 * shard * 1.0002 * 63 / 64 / TRANSFER_COSTS.tcp)
    settings = ("rollout.placement=disaggregated", "rollout.nodes_per_engine=1", "rollout.tensor_parallel_size=8")
    apart = shards_of(job("r1_zero", "grpo", *settings), 16)
    assert (apart.workers, apart.sent, apart.far, apart.through_host, apart.wakes) == (8, whole * 16 / 512, 1.0, False, False)
    assert shards_of(job("r1_zero", "grpo", *settings, "rollout.transfer=shm"), 16).through_host


def test_phases_that_do_not_wait_run_beside() -> None:
    def phase(name: str, length: float, *waits: str) -> TimePhase:
        return TimePhase(name, (Term("x", length),), waits)

    phases = (phase("a", 3), phase("b", 4), phase("c", 1, "a"), phase("d", 1, "b", "c"))
    plan = TimePlan("round", phases, devices=2, tokens=10, flops=20, peak=4, units=None, stage_seconds=None, assumptions=())
    assert plan.seconds == 5 and plan.tokens_per_second == 1 and plan.mfu == 0.5


def test_the_documents_have_these_times(zero: TimePlan) -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    cells = next(line for line in page.splitlines() if line.startswith("| `r1_zero.yaml` |")).split("|")[2:]
    said = [float(cell.replace(",", "")) for cell in cells[:1] + cells[2:6]]
    found = seconds(zero)
    expected = [found["sampling"], found["log-probs"], found["update"], found["weight sync"], zero.seconds]
    assert said == pytest.approx(expected, rel=0.01)
    short = timed(job("r1_zero", "grpo"), Assumed(response=2048))
    line = next(line for line in page.splitlines() if "2,048 tokens in the mean" in line)
    assert float(line.split("|")[7].replace(",", "")) == pytest.approx(short.seconds, rel=0.01)


def test_the_documents_say_what_more_cache_gives() -> None:
    less = job("r1_zero", "grpo", "rollout.gpu_memory_utilization=0.4")
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith("| `rollout.gpu_memory_utilization=0.4`"))
    assert float(line.split("|")[4].replace(",", "")) == pytest.approx(timed(less, Assumed(response=8192)).seconds, rel=0.01)
    work = model_work(less.arch)
    assert less.device is not None
    engine = Engine(64, attention=8, max_sequences=1024)
    engine = replace(engine, cache_tokens=cache_tokens(work, less.device, engine, 0.8))
    lengths = ResponseLengths(8192, 32768)
    drawn = sampling(work, less.device, engine, responses=8192, engines=8, prompt=160.0, shared_by=16, lengths=lengths)
    line = next(line for line in page.splitlines() if line.startswith("| attention of 8 devices"))
    assert float(line.split("|")[3].replace(",", "")) == pytest.approx(drawn.seconds, rel=0.01)
