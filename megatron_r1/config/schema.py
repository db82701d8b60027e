"""The tree of all settings. One tree serves all commands; each command reads the sections it needs.

Every section has its file here. Unknown keys are fatal (see `load.py`).
"""

from __future__ import annotations

from pydantic import Field

from megatron_r1.config.curation import CurationConfig
from megatron_r1.config.data import DataConfig
from megatron_r1.config.evaluation import EvaluateConfig
from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.config.pretrain import PretrainConfig
from megatron_r1.config.recipe import RecipeConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import CheckpointConfig, RuntimeConfig
from megatron_r1.config.section import MAY_CHANGE, MOST_SEED, Section
from megatron_r1.config.sft import SftConfig


class Config(Section):
    """The whole tree."""

    run_dir: str = Field(
        "runs/default",
        description="Folder of this run: its metrics, checkpoints and results. Started again with the same folder, a run goes on.",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(
        0,
        ge=-MOST_SEED,
        le=MOST_SEED,
        description="Seed of all random draws of a run: initial weights, order of the data, sampling of responses.",
    )
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    megatron: MegatronConfig = MegatronConfig()
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    grpo: GrpoConfig = GrpoConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    curation: CurationConfig = CurationConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recipe: RecipeConfig = RecipeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
