"""The folder and the settings of one run of the R1 pipeline, as its stages see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.load import override_config
from megatron_r1.config.recipe import RecipeConfig
from megatron_r1.config.schema import Config
from megatron_r1.pipeline.artifact import Artifact

BASE_MODELS = ("base", "student")  #: stages that start from nothing: `model.weights` may give their model


@dataclass(frozen=True)
class Recipe:
    """The pipeline's config and folder."""

    config: Config

    @property
    def root(self) -> Path:
        """Holds a folder for every stage."""
        return Path(self.config.run_dir)

    def artifact(self, stage: str) -> Artifact:
        """What a stage leaves for others; it may not exist yet."""
        return Artifact(self.root / stage / "hf")

    def weights(self, stage: str) -> Path:
        """The model of a stage: what it made, or the folder that it is given in `model.weights` (base and student)."""
        given = self.config_of(stage).model.weights if stage in BASE_MODELS else None
        return self.artifact(stage).folder if given is None else Path(given)

    def is_finished(self, stage: str) -> bool:
        """Whether a stage's model is there."""
        return self.weights(stage) != self.artifact(stage).folder or self.artifact(stage).exists

    def config_of(self, stage: str, settings: Mapping[str, Any] | None = None) -> Config:
        """The config of a stage, with some settings that its inputs give. It does not hold what is set for others.

        Raises:
            ConfigError: an unknown key or a wrong value, named.
        """
        config = override_config(self.config, self.config.recipe.stages.get(stage, {}), f"in recipe.stages.{stage}")
        config = config.model_copy(update={"recipe": RecipeConfig()})
        return override_config(config, {"run_dir": str(self.root / stage), **(settings or {})}, f"for stage {stage}")
