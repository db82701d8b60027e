"""Write and read a policy or a reward model with its optimizer as a Megatron distributed checkpoint, which any layout can load."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_r1.errors import CheckpointError, one_line
from megatron_r1.mcore import parallel
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.checkpoint_files import join, plan_folder
from megatron_r1.mcore.layout import Layout, padded_vocabulary
from megatron_r1.mcore.megatron_model import MegatronModel
from megatron_r1.mcore.optimizer_state import finish_loading, optimizer_state
from megatron_r1.mcore.policy import ReferencePolicy
from megatron_r1.runtime.distributed import failing_together, gather_on_rank_zero, on_rank_zero, rank, world_size
from megatron_r1.runtime.saving import Unwritten
from megatron_r1.weights.local_weights import name_some
from megatron_r1.weights.mapping import checkpoint_names

require_active()

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import CheckpointException

from megatron_r1.mcore.checkpoint_reading import read_checkpoint, read_shapes

_POLICY, _REFERENCE, _PROGRESS = "policy", "reference", "progress.json"
_HEAD = "output_layer.weight"
_VOCABULARY = ("embedding.word_embeddings.weight", _HEAD)


def plan_policy(policy: MegatronModel, folder: Path, reference: ReferencePolicy | None = None) -> Unwritten:
    """Fix what a checkpoint of this moment holds, and leave the writing for later. All ranks call this.

    Args:
        policy: the trained model. Tensors on the CPU must not change in the process that writes them.
        folder: exists.
        reference: saved, too, since it may be older than the policy.
    """
    parts = [plan_folder(_policy_state(policy), folder, _POLICY)]
    if reference is not None:
        parts.append(plan_folder(_reference_state(policy, reference), folder, _REFERENCE))
    left_out = {"skipped": policy.left_out.total, "spikes": policy.left_out.spikes}
    progress = json.dumps({"updates": policy.updates, **left_out, "layout": asdict(policy.layout)})
    on_rank_zero(lambda: (folder / _PROGRESS).write_text(progress))
    return join(parts)


def save_policy(policy: MegatronModel, folder: Path, reference: ReferencePolicy | None = None) -> None:
    """Write weights, optimizer and schedule below `folder`, which exists. All ranks call this."""
    planned = plan_policy(policy, folder, reference)
    with failing_together():
        written = planned.write()
    of_ranks = gather_on_rank_zero(written)
    on_rank_zero(lambda: planned.finish(of_ranks))


def load_policy(policy: MegatronModel, folder: Path, reference: ReferencePolicy | None = None) -> None:
    """Read what `save_policy` wrote, on the same or another layout. All ranks call this.

    Random generators are restored on the same layout only: on another, no saved state belongs to a rank.

    Raises:
        CheckpointError: the folder does not hold a checkpoint of this model, cannot be read, or holds a weight that is not finite.
    """
    progress = _read_progress(folder / _PROGRESS)
    tp = _tensor_parallel(progress["layout"])
    if reference is not None:
        _load_weights_from(policy, folder / _REFERENCE, tp)
        reference.refresh()
    state = _model_state(policy)
    _let_padding_differ(policy, state, folder / _POLICY, tp)
    state |= _optimizer_part(policy, state) | _average_part(policy, state)
    same_layout = _is_layout(policy.layout, progress["layout"])
    if same_layout:
        state["rng"] = _rng_state()
    loaded = _load(policy, state, folder / _POLICY)
    _take_weights(policy, loaded)
    policy.updates = progress["updates"]
    policy.left_out.total, policy.left_out.spikes = progress["skipped"], progress["spikes"]
    policy.check_finite(folder)
    if policy.optimizer is not None:
        finish_loading(policy.optimizer, loaded.get("optimizer", {}), policy.updates - policy.left_out.total)
    if policy.average is not None:
        policy.average.check_loaded(loaded.get("average", {}))
    if same_layout:
        _restore_rng(loaded["rng"], folder / _POLICY)


def _is_layout(layout: Layout, stored: dict[str, Any]) -> bool:
    """Whether a checkpoint's layout, read as JSON, is this one; older ones name no stages."""
    return {"stages": [], **stored} == json.loads(json.dumps(asdict(layout)))


def load_policy_weights(policy: MegatronModel, folder: Path, *, trunk_only: bool = False) -> None:
    """Take only the weights from a checkpoint, whatever layout and dtype it was written with. All ranks call this.

    Args:
        policy: its optimizer, if it has one, starts from these weights.
        folder: what `save_policy` or a conversion wrote.
        trunk_only: the checkpoint is a language model's, and `policy` a reward model on its trunk, whose head is left as it is.

    Raises:
        CheckpointError: the folder does not hold a checkpoint of this model, or cannot be read.
    """
    is_of_run = (folder / _PROGRESS).is_file()  # a conversion stores no padding
    tp = _tensor_parallel(_read_progress(folder / _PROGRESS)["layout"]) if is_of_run else 1
    _load_weights_from(policy, folder / _POLICY, tp, trunk_only)
    policy.check_finite(folder)
    policy.take_loaded_weights()


def sharding_metadata() -> dict[str, Any]:
    """How a checkpoint is cut, for Megatron-Core: the same for every writer and reader."""
    return {"dp_cp_group": parallel.groups().dp_cp}


def sharded_weights(module: torch.nn.Module) -> dict[str, Any]:
    """A module's sharded tensors, without what layers keep beside their weights.

    That is Transformer Engine's scaling of FP8: empty objects in a model that trains without FP8, as all do here, of which every
    kind of layer has others. A checkpoint without them can be loaded whichever layers are used.

    Raises:
        CheckpointError: a layer keeps something there, which a checkpoint would lose.
    """
    state = module.sharded_state_dict(metadata=sharding_metadata())
    beside = {name for name in state if _is_extra_state(name)}
    held = [name for name in sorted(beside) if not _is_empty(state[name].data)]
    if held:
        raise CheckpointError(f"{held[0]} holds scaling factors of FP8, which checkpoints do not keep: train without FP8")
    return {name: entry for name, entry in state.items() if name not in beside}


def _is_extra_state(name: str) -> bool:
    """Whether it is Transformer Engine's; grouped experts number theirs."""
    return name.rpartition(".")[2].rstrip("0123456789") == "_extra_state"


def _is_empty(extra_state: Any) -> bool:
    return extra_state is None or (isinstance(extra_state, torch.Tensor) and extra_state.numel() == 0)


def _model_state(policy: MegatronModel) -> dict[str, Any]:
    state = {f"model{i}": sharded_weights(module) for i, module in enumerate(policy.modules)}
    # Megatron-Core would cut or pad the vocabulary of another model without a word.
    dict_list_map_inplace(lambda e: replace(e, allow_shape_mismatch=False) if isinstance(e, ShardedTensor) else e, state)
    return state


def _let_padding_differ(policy: MegatronModel, state: dict[str, Any], folder: Path, tp: int) -> None:
    """Let the vocabulary be cut or filled with zeros where layouts differ in its padding alone.

    Args:
        state: the sharded state of the model, changed in place.
        folder: of a checkpoint.
        tp: tensor parallelism with which it was written.
    """
    size = policy.arch.vocab_size
    own, stored = padded_vocabulary(size, policy.layout.tp), padded_vocabulary(size, tp)
    if own == stored or not folder.is_dir():
        return
    try:
        shapes = read_shapes(folder)
    except (CheckpointError, OSError):  # the loading that follows says what is wrong with the folder
        return

    def let(entry: Any) -> Any:
        is_vocabulary = isinstance(entry, ShardedTensor) and entry.key in _VOCABULARY and entry.global_shape[0] == own
        fits = is_vocabulary and shapes.get(entry.key, ())[:1] == (stored,)
        return replace(entry, allow_shape_mismatch=True) if fits else entry

    dict_list_map_inplace(let, state)


def _policy_state(policy: MegatronModel) -> dict[str, Any]:
    policy.gather_late_weights()
    state = _model_state(policy)
    state |= _optimizer_part(policy, state) | _average_part(policy, state)
    state["rng"] = _rng_state()
    return state


def _optimizer_part(policy: MegatronModel, model_state: dict[str, Any]) -> dict[str, Any]:
    """Empty without an optimizer, and where other data-parallel ranks hold all of it."""
    held = {} if policy.optimizer is None else optimizer_state(policy.optimizer, model_state)
    return {"optimizer": held} if held else {}


def _average_part(policy: MegatronModel, model_state: dict[str, Any]) -> dict[str, Any]:
    """Empty without an average, and where other data-parallel ranks hold all of it."""
    held = {} if policy.average is None else policy.average.sharded_state(model_state)
    return {"average": held} if held else {}


def _reference_state(policy: MegatronModel, reference: ReferencePolicy) -> dict[str, Any]:
    """The sharded state of the policy's model with the reference's tensors in it."""
    held = {own.data_ptr(): kept for own, kept in zip(policy.local_state(), reference.state, strict=True)}

    def exchange(entry: Any) -> Any:
        is_tensor = isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        return replace(entry, data=held[entry.data.data_ptr()]) if is_tensor else entry

    state = _model_state(policy)
    dict_list_map_inplace(exchange, state)
    return state


def _rng_state() -> ShardedObject:
    states = {"torch": torch.get_rng_state(), "megatron": parallel.generator_states()}
    if require_active() == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng", states, (world_size(),), (rank(),))


def _restore_rng(states: dict[str, Any], folder: Path) -> None:
    try:
        torch.set_rng_state(states["torch"])
        parallel.set_generator_states(states["megatron"])
        if "cuda" in states and require_active() == "cuda":  # a run may go on without a GPU
            torch.cuda.set_rng_state(states["cuda"])
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"the random state in {folder} cannot be used: {one_line(error)}") from None


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = json.loads(path.read_text())
        left_out = {name: int(progress.get(name, 0)) for name in ("skipped", "spikes")}  # earlier versions left none out
        return {"updates": int(progress["updates"]), **left_out, "layout": progress["layout"]}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say how far the run was: {one_line(error)}") from None


def _tensor_parallel(layout: Any) -> int:
    """Of a saved layout; 1 where it says none that could be."""
    tp = layout.get("tp") if isinstance(layout, dict) else None
    return tp if isinstance(tp, int) and tp > 0 else 1


def _load_weights_from(policy: MegatronModel, folder: Path, tp: int, trunk_only: bool = False) -> None:
    state = _model_state(policy)
    _let_padding_differ(policy, state, folder, tp)
    heads = {name: part.pop(_HEAD).data for name, part in state.items() if trunk_only and _HEAD in part}
    loaded = _load(policy, state, folder)
    for name, head in heads.items():
        loaded[name][_HEAD] = head
    _take_weights(policy, loaded)


def _take_weights(policy: MegatronModel, loaded: dict[str, Any]) -> None:
    for i, module in enumerate(policy.modules):
        taken = module.load_state_dict(loaded[f"model{i}"], strict=False)
        wrong = [name for name in (*taken.missing_keys, *taken.unexpected_keys) if not _is_extra_state(name)]
        assert not wrong, f"the state was made of this module, which has others than {name_some(wrong)}"


def _load(policy: MegatronModel, state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`state` with the values of a folder that `plan_folder` made."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: this checkpoint does not hold what the run needs")
    try:
        _name_as_stored(policy, state, folder)
        return read_checkpoint(state, folder)
    except (Exception, CheckpointException) as error:
        # A folder from elsewhere makes them raise whatever they like; torch gathers the errors of the ranks that have one.
        of_ranks = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        reason = str((of_ranks or [error])[0]).strip().splitlines()
        raise CheckpointError(
            f"{folder} cannot be loaded into this model: {reason[0] if reason else type(error).__name__}"
        ) from error


def _name_as_stored(policy: MegatronModel, state: dict[str, Any], folder: Path) -> None:
    """Ask for tensors under the names that a folder has them by, which may be those of Transformer Engine's layers."""
    names = on_rank_zero(lambda: checkpoint_names(read_shapes(folder), policy.arch))

    def rename(entry: Any) -> Any:
        is_stored_otherwise = isinstance(entry, ShardedTensor) and entry.key in names
        return replace(entry, key=names[entry.key]) if is_stored_otherwise else entry

    if names:
        dict_list_map_inplace(rename, state)
