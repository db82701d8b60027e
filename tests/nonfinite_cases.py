"""Every training stage with one token that breaks an update: it stops or leaves the update out, and goes on from its checkpoint.

No code of the project is replaced. The embedding of the token HOT is finite, but so large that RMSNorm's derivative is 0 x inf: the
loss stays finite and the gradient is NaN. It stands in the data of one step.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.pretrain import PretrainConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import CheckpointConfig, RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.config.sft import SftConfig
from megatron_r1.data.documents import DocumentStream
from megatron_r1.data.reward_packing import ScoredExample
from megatron_r1.errors import NonFiniteUpdate
from megatron_r1.model.families.deepseek_v3 import DeepseekV3
from megatron_r1.runtime.checkpoints import newest_intact
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.run_folder import CHECKPOINTS
from megatron_r1.training.grpo import train_grpo
from megatron_r1.training.pretrain import loss_over, train_base
from megatron_r1.training.pretrain_plan import PretrainPlan
from megatron_r1.training.reward_model import train_reward_model
from megatron_r1.training.sft import train_sft
from megatron_r1.types import Prompt, Rollout, RolloutGroup, TrainingSample
from tests.random_weights import qwen2_architecture

HOT, EOS, STEPS = 77, 1, 4
ARCHITECTURE = DeepseekV3(
    vocab_size=80, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0, intermediate_size=32,
    num_attention_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    max_position_embeddings=64, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=16, num_experts_per_tok=2, n_group=1,
    topk_group=1, init_std=0.05,
)  # fmt: skip
MOE = MoeTrainingConfig(bias_update_rate=0.01)
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1)


class Killed(Exception):
    """Ends a run where a kill would."""


@dataclass
class Case:
    """One run: a stage, on some layout."""

    stage: str
    hot_steps: tuple[int, ...] = (2,)  #: steps whose data hold the token
    dtype: str = "fp32"
    sizes: dict[str, int] = field(default_factory=dict)
    engine_lies_at: int = 0  #: grpo: the step at which the engine gives one token NaN as its log-prob
    dies_at: int = 0  #: the step whose data end the run
    settings: dict[str, Any] = field(default_factory=dict)  #: grpo: of its stage
    lr: float = 1e-3


@dataclass
class Outcome:
    """What is left of a run."""

    lines: list[dict[str, Any]]  #: of metrics.jsonl
    error: str
    weights: list[torch.Tensor]
    updates: int
    told: str  #: on stderr


def run_case(case: Case, folder: Path, skip: int, world_size: int = 1) -> Outcome:
    """Begin the run in the folder, or go on with it."""
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.checkpoint import load_policy, plan_policy
    from megatron_r1.mcore.policy import MegatronPolicy
    from megatron_r1.mcore.reward_model import MegatronRewardModel

    is_reward_model = case.stage == "reward-model"
    arch, kind = ARCHITECTURE, MegatronPolicy
    if is_reward_model:
        arch, kind = arch.as_reward_model("helpful"), MegatronRewardModel
    runtime = RuntimeConfig(device="cpu", dtype=case.dtype, skip_nonfinite_updates=skip)
    config = Config(runtime=runtime, checkpoint=CheckpointConfig(interval=1, asynchronous=False), run_dir=str(folder))
    with_layout = parallel.resolve_layout(ParallelConfig(**case.sizes), arch, world_size, mtp=False)
    parallel.build_process_groups(with_layout, seed=1)
    model = kind(
        arch, with_layout, runtime, MOE, optimizer=OPTIMIZER.model_copy(update={"lr": case.lr}), total_updates=2 * STEPS, seed=7,
        device=torch.device("cpu"), micro_batch_tokens=64,
    )  # fmt: skip
    heat(model)
    error, told = "", io.StringIO()
    try:
        with redirect_stderr(told), Run.open(folder, config, case.stage) as run:
            if run.resumed_from is not None:
                load_policy(model, run.resumed_from)
            _LOOPS[case.stage](case, model, run, lambda target: plan_policy(model, target))
    except NonFiniteUpdate as caught:
        error = str(caught)
        newest = newest_intact(folder / CHECKPOINTS)
        if newest is not None:
            refused = [weight.clone() for weight in model.local_state()]
            load_policy(model, newest)
            same = [torch.equal(a, b) for a, b in zip(refused, model.local_state(), strict=True)]
            assert all(same), "a refused update touches no weight: they are the last checkpoint's, which is finite"
            assert all(weight.isfinite().all() for weight in refused)
    except Killed:
        pass
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    weights = [tensor.clone() for tensor in model.local_state()]
    return Outcome([line for line in lines if line["step"]], error, weights, model.updates, told.getvalue())


def heat(model: Any) -> None:
    """Give the token its embedding, on the ranks that hold it."""
    for module in model.modules:
        if module.pre_process:
            embedding = module.embedding.word_embeddings
            row = HOT - embedding.vocab_start_index
            if 0 <= row < embedding.weight.shape[0]:
                embedding.weight.data[row] = 3e38
    model.optimizer.reload_model_params()


def tokens(seed: object, hot: bool, length: int = 9) -> list[int]:
    """Random ids, with the token among them or not."""
    draw = random.Random(str(seed))
    ids = [draw.randrange(2, HOT) for _ in range(length)]
    if hot:
        ids[length // 2] = HOT
    return ids


def live(case: Case, step: int) -> None:
    """Ends the run at its step."""
    if step == case.dies_at:
        raise Killed


def _pretrain(case: Case, model: Any, run: Run, save: Callable[..., Any]) -> None:
    from megatron_r1.mcore import parallel

    rows, width = 4, 8

    class Source:
        fingerprint = "numbers"

        def encode(self, number: int, seed: int, tokenizer: Any) -> list[int]:  # with its end, a row
            step = number // rows + 1
            if number % rows == 1:  # a stream reads one document ahead
                live(case, step)
            return tokens(number, step in case.hot_steps and number % rows == 2, width - 1)

        def name(self, number: int, seed: int) -> str:
            return f"document {number}"

    documents = DocumentStream(Source(), SimpleNamespace(eos_id=EOS), 0, False, width)
    if run.state:
        documents.load_state_dict(run.state["documents"])
    stage = PretrainConfig(
        steps=STEPS,
        sequence_length=width,
        global_batch_size=rows,
        micro_batch_size=1,
        optimizer=OPTIMIZER,
        moe=MOE.model_dump(),
    )
    where = (parallel.data_parallel_rank(), model.layout.dp)
    plan = PretrainPlan(stage)
    train_base(
        stage, plan=plan, phase=plan.phases[0], policy=model, rows=documents, run=run, save=save, gate=None, data_parallel=where
    )


def _sft(case: Case, model: Any, run: Run, save: Callable[..., Any]) -> None:
    class Data:
        epoch_size, dropped, fingerprint = 4 * STEPS, 0, "numbers"

        def validation(self) -> list[TrainingSample]:
            return []

        def state_dict(self) -> dict[str, Any]:
            return {}

        def epoch(self, number: int) -> list[int]:
            return list(range(self.epoch_size))

        def take(self, numbers: list[int]) -> list[TrainingSample]:
            step = numbers[0] // 4 + 1
            live(case, step)
            ids = [tokens(n, step in case.hot_steps and n % 4 == 2) for n in numbers]
            return [TrainingSample(t, [0] * 3 + [1] * 5, name=f"sample {n}") for n, t in zip(numbers, ids, strict=True)]

    train_sft(SftConfig(batch_size=4, micro_batch_tokens=64, epochs=1), policy=model, data=Data(), run=run, save=save)


def _reward_model(case: Case, model: Any, run: Run, save: Callable[..., Any]) -> None:
    # Their order is shuffled: with one hot example there is one hot step, with two in one batch, too.
    stage = RewardModelConfig(batch_size=4, micro_batch_tokens=64)
    examples = [ScoredExample((tokens(n, False), tokens(-n - 1, False)), name=f"pair {n}") for n in range(4 * STEPS)]
    from megatron_r1.training.samples import minibatches

    of_steps = list(minibatches(list(range(len(examples))), stage.batch_size, "0/0"))
    for step in case.hot_steps:
        number = of_steps[step - 1][2]
        examples[number] = replace(examples[number], sequences=(tokens(number, True), tokens(-number - 1, False)))

    class Model:
        def train_step(self, batch: Any, loss_fn: Any) -> Any:
            live(case, model.updates + 1)
            return model.train_step(batch, loss_fn)

    train_reward_model(stage, model=Model(), examples=examples, heldout=[], run=run, save=save, seed=0)


def _grpo(case: Case, model: Any, run: Run, save: Callable[..., Any]) -> None:
    from megatron_r1.mcore.policy import ReferencePolicy

    group_size = 2
    sizes = {"rollouts": STEPS, "prompts_per_rollout": 2, "group_size": group_size, "minibatch_size": 4, "micro_batch_tokens": 64}
    stage = GrpoConfig(**sizes, **{"kl_coef": 0.0, "optimizer": OPTIMIZER, **case.settings})

    class Prompts:
        taken = run.state["prompts"] if run.state else 0

        def next(self, count: int) -> list[Prompt]:
            step = self.taken // count + 1
            live(case, step)
            made = range(self.taken, self.taken + count)
            self.taken += count
            return [Prompt(f"p{n}", "q", "a", "t", tuple(tokens(n, step in case.hot_steps and n % 2 == 1, 5))) for n in made]

        def state_dict(self) -> Any:
            return self.taken

    class Engine:
        def load_weights(self, weights: Any, version: int) -> None:
            holders = weights.find_holders([weights.describe()])
            read = [weights.read(name, holders.boxes(name)[0][0]) for name in holders.names() if holders.shape(name)]
            assert read and all(weight.isfinite().all() for weight in read), "no engine is given such a weight"
            self.version = version

        def sleep(self) -> None: ...

        def generate(self, prompts: list[Prompt], sampling: Any, seed: int, on_group: Any) -> list[RolloutGroup]:
            groups = []
            for prompt in prompts:
                answers = [tokens((prompt.id, i), False, 6) for i in range(group_size)]
                rollouts = [Rollout(a, [-5.0] * 6, "text", True) for a in answers]
                if case.engine_lies_at == int(prompt.id[1:]) // 2 + 1 and int(prompt.id[1:]) % 2:
                    rollouts[1].rollout_logprobs[3] = math.nan
                groups.append(RolloutGroup(prompt, rollouts, self.version))
            return groups

        def metrics(self) -> dict[str, float]:
            return {}

    class Rewards:
        def submit(self, group: RolloutGroup) -> None: ...

        def collect(self, groups: list[RolloutGroup], prompts: list[Prompt]) -> list[RolloutGroup]:
            for group in groups:
                group.rewards_G = torch.tensor([0.0, 1.0], dtype=torch.float64)
            return groups

    bounds = RolloutConfig(max_response_tokens=6, max_logprob_diff_mean=1e6, max_logprob_diff_max=1e6)
    reference = ReferencePolicy(model) if stage.has_reference else None
    train_grpo(
        stage, bounds, policy=model, reference=reference, engine=Engine(), rewards=Rewards(), prompts=Prompts(), run=run, save=save,
        evaluate=lambda step: {}, seed=0,
    )  # fmt: skip


_LOOPS = {"pretrain": _pretrain, "sft": _sft, "reward-model": _reward_model, "grpo": _grpo}


def check_stage(case: Case, folder: Path, world_size: int = 1, thorough: bool = True) -> None:
    """Stop, go on with leave to skip and, if `thorough`, skip the same with a kill in between, but not twice."""
    stopped = run_case(case, folder / "stops", skip=0, world_size=world_size)
    want = {"pretrain": "document 6", "sft": "sample 6", "reward-model": "pair ", "grpo": "response 0 to problem p3"}[case.stage]
    if case.engine_lies_at:
        want = "the rollout engine's log-probability of a token of response 1 to problem p3 is NaN or infinite"
    assert stopped.error.startswith("step 2: update 2 is not finite: ") and want in stopped.error, stopped.error
    assert "\n" not in stopped.error and "runtime.skip_nonfinite_updates" in stopped.error
    assert [line["step"] for line in stopped.lines] == [1] and "updates/skipped" not in stopped.lines[0]
    skipped = run_case(case, folder / "stops", skip=1, world_size=world_size)
    assert not skipped.error and skipped.updates == STEPS
    assert [line.get("updates/skipped") for line in skipped.lines] == [None, 1, 1, 1]
    assert [line["loss"] is None for line in skipped.lines] == [False, True, False, False]
    assert [line["grad_norm"] is None for line in skipped.lines] == [False, True, False, False]
    assert all(weight.isfinite().all() for weight in skipped.weights)
    if case.stage == "pretrain" and dist.get_rank() == 0:
        assert f"document 6\nmegatron-r1 show-samples {folder / 'stops'} 2  # what was left out\n" in skipped.told
    moved = [not torch.equal(a, b) for a, b in zip(skipped.weights, stopped.weights, strict=True)]
    assert any(moved), "training went on"
    if not thorough:
        return
    killed = run_case(replace(case, dies_at=4), folder / "killed", skip=1, world_size=world_size)
    assert not killed.error and [line["step"] for line in killed.lines] == [1, 2, 3]
    resumed = run_case(case, folder / "killed", skip=1, world_size=world_size)
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights, skipped.weights, strict=True))
    keys = ("step", "loss", "grad_norm", "lr")
    assert [[line[k] for k in keys] for line in resumed.lines] == [[line[k] for k in keys] for line in skipped.lines]
    assert [line["updates/skipped"] for line in resumed.lines] == [0, 1, 1, 1]

    if case.stage == "sft":
        twice = run_case(replace(case, hot_steps=(2, 4)), folder / "twice", skip=1, world_size=world_size)
        assert twice.error.startswith("step 4: update 4 is not finite") and "skip_nonfinite_updates=1 allows no more" in twice.error


def check_infinite_weight(dtype: str, sizes: dict[str, int], folder: Path, world_size: int = 1) -> None:
    """Weight decay of 20 takes the token's embedding beyond float32: it is noticed before a sync and a checkpoint, on all ranks."""
    case = Case("grpo", hot_steps=(), dtype=dtype, sizes=sizes, lr=200.0)
    found = run_case(case, folder, skip=3, world_size=world_size)
    want = "step 1: weight embedding.word_embeddings.weight holds NaN or infinite values after update 1, whose gradient was finite;"
    assert found.error.startswith(want) and "\n" not in found.error, found.error
    assert not found.lines and newest_intact(folder / CHECKPOINTS) is None


def check_fault_of_one_rank(model: Any, weight: str) -> None:
    """The last rank's gradient of a weight is broken after all were reduced: every rank sees it, also where norms leave it out."""
    own = model.modules[0].config.finalize_model_grads_func

    def finalize(*arguments: Any, **more: Any) -> None:
        own(*arguments, **more)
        if dist.get_rank() == dist.get_world_size() - 1:
            (gradient,) = (p.main_grad for m in model.modules for name, p in m.named_parameters() if name == weight)
            gradient.view(-1)[0] = math.nan

    before = [tensor.clone() for tensor in model.local_state()]
    samples = [TrainingSample(tokens(n, False), [1] * 8, name=f"sample {n}") for n in range(2)]
    spike = model.train_step(samples, loss_over(16))
    assert (spike.applied, model.left_out.spikes) == (False, 1) and math.isfinite(spike.loss + spike.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(model.local_state(), before, strict=True))
    model.modules[0].config.finalize_model_grads_func = finalize
    try:
        model.train_step(samples, loss_over(16))
    except NonFiniteUpdate as caught:
        assert f"the gradient of {weight} holds NaN or infinite values" in str(caught), str(caught)
    else:
        raise AssertionError(f"a NaN in the gradient of {weight} was not seen")
    assert all(torch.equal(a, b) for a, b in zip(model.local_state(), before, strict=True))


def check_faults(world_size: int) -> None:
    """Weights of which several ranks hold a copy: only one copy's gradient is part of the norm."""
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.policy import MegatronPolicy

    for arch, sizes, dtype, weight in (
        (ARCHITECTURE, {"tp": 2}, "fp32", "decoder.final_layernorm.weight"),
        (ARCHITECTURE, {"tp": 2}, "bf16", "decoder.layers.1.mlp.router.weight"),
        (qwen2_architecture(tied=True), {"pp": 2}, "bf16", "output_layer.weight"),
    ):
        layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=False)
        parallel.build_process_groups(layout, seed=1)
        model = MegatronPolicy(
            arch, layout, RuntimeConfig(device="cpu", dtype=dtype), MOE, total_updates=4, seed=7, device=torch.device("cpu"),
            optimizer=OPTIMIZER.model_copy(update={"skip_grad_norm": 1e-9}), micro_batch_tokens=64,
        )  # fmt: skip
        check_fault_of_one_rank(model, weight)


#: Every stage in both dtypes; together they take the layouts of two ranks.
ONE_RANK = [Case(stage, dtype=dtype) for stage in _LOOPS for dtype in ("fp32", "bf16")]
ENGINE = Case("grpo", hot_steps=(), engine_lies_at=2)
_SIZES: list[dict[str, int]] = [{"tp": 2}, {"pp": 2}, {}, {"ep": 2}, {"pp": 2}, {"tp": 2}, {"ep": 2}, {}]
TWO_RANKS = [replace(case, sizes=sizes) for case, sizes in zip(ONE_RANK, _SIZES, strict=True)] + [ENGINE]
