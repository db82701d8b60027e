"""What all training stages share: skip a finished stage, resume, write checkpoints, export and seal the model.

Every stage writes `<run_dir>/hf`, a sealed artifact; a stage whose artifact is there is not run again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.config.resume import check_settings, input_paths, require_longer
from megatron_r1.config.schema import Config
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.artifact import Artifact, hash_files
from megatron_r1.pipeline.builders.export import describe_policy, export_policy
from megatron_r1.pipeline.session import Session
from megatron_r1.report.html import REPORT, write_report
from megatron_r1.runtime.checkpoints import complete_checkpoints
from megatron_r1.runtime.distributed import broadcast_object, on_rank_zero
from megatron_r1.runtime.files import TEMPORARY
from megatron_r1.runtime.inputs import NOTES, compare_inputs
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.run_folder import CHECKPOINTS, updates_per_epoch
from megatron_r1.runtime.saving import Unwritten, Write

if TYPE_CHECKING:
    from megatron_r1.mcore.megatron_model import MegatronModel
    from megatron_r1.mcore.policy import ReferencePolicy

RunStage = Callable[[Config, Session], Artifact]


def unless_finished(run: RunStage) -> RunStage:
    """Skip a stage whose artifact is in `run_dir` already: verify the artifact and return it. One that is to be longer goes on.

    The function that is returned raises ConfigError if the artifact was made with other settings, DataError if it was made from
    other data or models, and CheckpointError if it has changed.
    """

    @wraps(run)
    def run_or_skip(config: Config, session: Session) -> Artifact:
        artifact = stage_artifact(config)
        if not broadcast_object(artifact.exists) or _is_to_go_on(config, artifact):
            return run(config, session)
        on_rank_zero(artifact.verify)
        on_rank_zero(lambda: _write_missing_report(Path(config.run_dir)))
        on_rank_zero(lambda: print(f"{artifact.folder} is finished; remove {artifact.folder.parent} to make it again", flush=True))
        return artifact

    return run_or_skip


def _write_missing_report(folder: Path) -> None:
    """What a stage that was killed behind its artifact has not done."""
    if (folder / REPORT).exists() or not (folder / "run.json").is_file() or not os.access(folder, os.W_OK):
        return  # it was written, or the folder holds the model alone, or is another user's
    for path in folder.glob(f"{REPORT}{TEMPORARY}*"):
        path.unlink()
    write_report(folder)


def _is_to_go_on(config: Config, artifact: Artifact) -> bool:
    """Whether a finished stage is to be longer. All ranks call this."""
    folder = Path(config.run_dir)

    def compare() -> tuple[bool, dict[str, str] | None]:
        stage, before, hashes = artifact.made_with()
        where = f"{artifact.folder} is finished, and was made with"
        per_epoch = updates_per_epoch(folder)
        is_other_length = check_settings(before, config, stage, where, updates_per_epoch=per_epoch, finished=True)
        if is_other_length:
            require_longer(before, config, stage, where)
            require_setting(
                bool(complete_checkpoints(folder / CHECKPOINTS)),
                f"{folder} holds no checkpoint from which its training could go on: start another run_dir from "
                f"model.weights={artifact.folder}",
            )
            return True, None
        return False, _unmoved(input_paths(config, stage), input_paths(before, stage), hashes, folder)

    goes_on, inputs = on_rank_zero(compare)
    if inputs:
        compare_inputs(folder, inputs, inputs, note=False)
    return goes_on


def _unmoved(paths: Mapping[str, str], before: Mapping[str, str], hashes: Mapping[str, str], folder: Path) -> dict[str, str] | None:
    """The inputs to compare with what the run has noted; of an older run, which noted nothing, the moved ones are compared here."""
    if (folder / NOTES).is_file():
        return dict(paths)
    for key, path in paths.items():
        if path != before.get(key) and Path(path).exists() and hash_files(Path(path)) != hashes.get(key):
            raise DataError(
                f"{key}: {path} is not what {folder} was made from ({before.get(key)}): restore it, or choose another run_dir"
            )
    return None


def stage_artifact(config: Config) -> Artifact:
    """What a stage with this config leaves; it may not exist yet."""
    return Artifact(Path(config.run_dir) / "hf")


def resume_run(run: Run, policy: MegatronModel, reference: ReferencePolicy | None = None) -> dict[str, Any] | None:
    """Load the checkpoint that the run resumes from, if there is one, and return the state that was saved with it.

    Also of a run that begins: the replicas of all weights are compared before anything is trained.

    Raises:
        CheckpointError: see `load_policy`.
        ReplicasDiffer: ranks hold different replicas of a weight.
    """
    from megatron_r1.mcore.checkpoint import load_policy

    if run.resumed_from is not None:
        load_policy(policy, run.resumed_from, reference)
    policy.check_replicas()
    return run.state


def checkpoint_writer(policy: MegatronModel, tokenizer: Tokenizer, reference: ReferencePolicy | None = None) -> Write:
    """A function that writes the model into a checkpoint, with config and tokenizer, which make it a model by itself."""
    from megatron_r1.mcore.checkpoint import plan_policy

    def save(folder: Path) -> Unwritten:
        on_rank_zero(lambda: describe_policy(policy, tokenizer, folder))
        return plan_policy(policy, folder, reference)

    return save


def finish_stage(
    config: Config, stage: str, model: MegatronModel, tokenizer: Tokenizer, inputs: Mapping[str, str] | None = None
) -> Artifact:
    """Export the model, seal it with its inputs, and write the report.

    Args:
        inputs: files beside weights, tokenizer and `data.source` that the model was made from: setting -> path.
    """
    artifact = stage_artifact(config)
    export_policy(model, tokenizer, artifact.folder)
    paths = {"model.weights": config.model.weights, "data.tokenizer": config.data.tokenizer}
    if Path(config.data.source).exists():
        paths["data.source"] = config.data.source
    paths |= inputs or {}

    def seal() -> None:
        # That of the run before it was longer: a kill may come before the new one is written.
        (Path(config.run_dir) / REPORT).unlink(missing_ok=True)
        artifact.seal(stage, config.model_dump(), {name: Path(path) for name, path in paths.items() if path})
        write_report(Path(config.run_dir))

    on_rank_zero(seal)
    return artifact


def require_setting(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
