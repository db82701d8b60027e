"""A checkpoint goes on under any layout as under the one it was written with, optimizer included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.conversion.megatron_folder import MegatronFolder
from megatron_r1.conversion.torch_dist import StoredTensors
from megatron_r1.mcore.ask_ranks import shards_of_layout
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.state_bytes import optimizer_bytes
from megatron_r1.runtime.launch import free_port
from tests.random_weights import uneven_qwen2
from tests.ranks import run_ranks

LAYOUTS = {
    "one": {}, "dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "vpp2": {"pp": 2, "vpp": 2}, "ep2": {"ep": 2}, "cp2": {"cp": 2},
    "pp2-dp2": {"pp": 2},
}  # fmt: skip
V3, MTP, QWEN = "deepseek_v3", "deepseek_v3-mtp", "qwen2"
#: model, layout of the checkpoint, layout that goes on
RESHARDED = [
    *[(MTP, "dp2", layout) for layout in ("tp2", "vpp2", "ep2")],
    *[(MTP, "ep2", layout) for layout in ("dp2", "pp2")],
    *[(V3, "dp2", layout) for layout in ("pp2", "ep2", "cp2")],
    (V3, "ep2", "dp2"), (V3, "one", "dp2"), (QWEN, "dp2", "tp2"), (QWEN, "dp2", "pp2"),
    (QWEN, "tp2", "dp2"),  # its vocabulary is padded for two ranks, and is not for one
    (QWEN, "pp2-dp2", "pp2"),  # the shared embedding has a bucket of its own, and both have padding
]  # fmt: skip
SAME = [(MTP, "ep2"), (QWEN, "dp2")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What every job found, by name."""
    folder = tmp_path_factory.mktemp("reshard")

    def job(what: str, model: str, saved: str, layout: str) -> dict:
        return {
            "name": f"{what} {model} {saved} {layout}", "do": what, "model": model, "parallel": LAYOUTS[layout],
            "folder": str(folder / f"{model}-{saved}"),
        }  # fmt: skip

    pairs = dict.fromkeys((model, saved) for model, saved, _ in RESHARDED)
    saves = [job("save", model, saved, saved) for model, saved in pairs]
    loads = [job("load", *case) for case in RESHARDED] + [job("load", model, saved, saved) for model, saved in SAME]
    other = {"one": 1, "pp2-dp2": 4}  # processes of the layouts that do not have two
    found: dict[str, dict] = {}
    for saved, world_size in other.items():
        found |= run([save for save in saves if save["name"].endswith(f" {saved}")], world_size, folder / f"{saved}.json")
    here = [save for save in saves if save["name"].split()[-1] not in other]
    found |= run([*here, *loads, job("weights", MTP, "dp2", "dp2")], 2, folder / "two.json")
    return found | {"folder": {"path": str(folder)}}


def run(jobs: list[dict], world_size: int, results: Path) -> dict[str, dict]:
    """Do the jobs, in order, in one set of processes."""
    run_ranks(Path(__file__).with_name("reshard.py"), world_size, free_port(), json.dumps(jobs), results, timeout=300)
    return json.loads(results.read_text())


@pytest.mark.parametrize(("model", "saved", "layout"), RESHARDED)
def test_another_layout_goes_on_within_1e_5(results: dict[str, dict], model: str, saved: str, layout: str) -> None:
    want, got = results[f"save {model} {saved} {saved}"], results[f"load {model} {saved} {layout}"]
    assert got["updates"] == want["updates"] == 6
    for (loss, grad_norm, lr), (want_loss, want_grad_norm, want_lr) in zip(got["steps"], want["steps"], strict=True):
        assert loss == pytest.approx(want_loss, abs=1e-5)
        assert grad_norm == pytest.approx(want_grad_norm, rel=1e-4)
        assert lr == want_lr


@pytest.mark.parametrize(("model", "saved"), SAME)
def test_the_same_layout_goes_on_bit_by_bit(results: dict[str, dict], model: str, saved: str) -> None:
    want, got = results[f"save {model} {saved} {saved}"], results[f"load {model} {saved} {saved}"]
    assert got["steps"] == want["steps"]
    assert got["drawn"] == want["drawn"]
    assert len(set(got["drawn"])) == 2, "each rank has a generator of its own"


def test_every_data_parallel_rank_writes_and_reads_its_own_share(results: dict[str, dict]) -> None:
    saved, loaded = results[f"save {QWEN} dp2 dp2"], results[f"load {QWEN} dp2 dp2"]
    weights = saved["weights"][0]
    share = optimizer_bytes(weights // 4, data_parallel=2)
    # Views are copied before they are written; of the weights, which both have, the first rank writes all.
    assert saved["peak"][0] <= share + weights
    assert saved["peak"][1] <= share
    assert max(loaded["peak"]) <= weights, "no rank reads more than its share, tensor by tensor"
    files = [path.stat().st_size for path in (Path(results["folder"]["path"]) / f"{QWEN}-dp2/policy").glob("*.distcp")]
    assert len(files) == 2 and min(files) > 0.95 * share


@pytest.mark.parametrize(("model", "saved"), [(MTP, "dp2"), (MTP, "ep2"), (QWEN, "pp2-dp2")])
def test_the_shares_of_all_ranks_make_up_the_optimizer(results: dict[str, dict], model: str, saved: str) -> None:
    stored = StoredTensors(Path(results["folder"]["path"]) / f"{model}-{saved}/policy")
    tensors = {name for name in stored.names() if name.startswith("optimizer.")}
    assert tensors == {
        f"optimizer.state.{kind}.{name}" for kind in ("param", "exp_avg", "exp_avg_sq") for name in stored.names()
        if f"optimizer.state.exp_avg.{name}" in tensors
    }  # fmt: skip
    for name in tensors:
        values = stored.read(name)  # raises if boxes are missing
        if name.startswith("optimizer.state.param."):
            assert values.equal(stored.read(name.removeprefix("optimizer.state.param."))), "fp32 has no other master weights"


def test_weights_alone_go_another_way(results: dict[str, dict]) -> None:
    """The comparison means something: without the optimizer's state the losses differ by more than ten times as much."""
    want, got = results[f"save {MTP} dp2 dp2"]["steps"], results[f"weights {MTP} dp2 dp2"]["steps"]
    assert got[0][0] == want[0][0]
    assert max(abs(mine[0] - theirs[0]) for mine, theirs in zip(got, want, strict=True)) > 1e-4


def test_the_padding_of_a_vocabulary_is_cut_when_a_checkpoint_is_read(results: dict[str, dict]) -> None:
    arch, folder = uneven_qwen2(), Path(results["folder"]["path"])
    stored, plain = (
        MegatronFolder(folder / f"{QWEN}-{layout}", arch, shards_of_layout(arch, Layout()).pieces) for layout in ("tp2", "dp2")
    )
    assert StoredTensors(folder / f"{QWEN}-tp2/policy").shape("embedding.word_embeddings.weight") == (132, arch.hidden_size)
    for i, entry in enumerate(stored.entries):
        assert stored.read(i).shape == plain.read(i).shape == entry.full_shape
    assert not stored.read(0).eq(0).all(1).any()
