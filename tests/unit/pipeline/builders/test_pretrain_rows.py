"""Rows of a run in phases on several blends: what each phase reads, and what a run that goes on is held against."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.config.load import load_config
from megatron_r1.data.fill_in_middle import MARKS
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.mcore import host
from megatron_r1.pipeline.builders.pretrain_rows import PretrainData, blend_indices
from megatron_r1.pipeline.stages.pretrain import check_pretrain
from tests.one_rank import one_rank_world
from tests.token_sources import numbered_documents, with_tokens, write_source

host.activate("cpu")

LENGTH = 16


@pytest.fixture(scope="module", autouse=True)
def process_group():
    one_rank_world()


@pytest.fixture(scope="module")
def tokenizer():
    return with_tokens(*MARKS[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("a", "b", "c", "copies/a"):
        first = 7 + 50 * (ord(name[-1]) - ord("a"))
        documents = [[first + n % 40] * (1 + n % 9) + [tokenizer.eos_id] for n in range(150)]
        (folder / name).parent.mkdir(exist_ok=True)
        write_source(folder / name, documents)
    return folder


def opened(folder: Path, tokenizer, phases: list[dict], *settings: str) -> tuple[PretrainData, list]:
    for phase in phases:
        phase |= {"updates": 3, "global_batch_size": 4}
        for source in phase.get("blend", []):
            source["path"] = str(folder / source["path"])
    given = [f"run_dir={folder / 'run'}", f"data.blend=[{folder / 'a'}, {folder / 'b'}]", "data.split=[4, 1]"]
    given += [f"pretrain.sequence_length={LENGTH}", "pretrain.global_batch_size=4", "pretrain.micro_batch_size=2"]
    config = load_config(None, [*given, f"pretrain.phases={json.dumps(phases)}", *settings])
    plan = check_pretrain(config)
    data = PretrainData(config, tokenizer, plan)
    return data, [data.of_phase(phase) for phase in plan.phases]


def source(name: str, weight: float = 1.0) -> dict:
    return {"path": name, "weight": weight}


def tokens_of(rows) -> list[list[int]]:
    return rows.micro_batch(range(12)).token_ids.tolist()


def test_each_phase_has_its_blend_and_no_row_of_a_source_comes_twice(folder, tokenizer):
    phases = [{}, {"blend": [source("c"), source("a", 3)]}, {"blend": [source("copies/a", 2), source("b", 2)]}, {}]
    data, found = opened(folder, tokenizer, phases, "pretrain.validation.interval=1")
    rows = [tokens_of(training) for training, _ in found]
    names = [{rows.name_of(rows.micro_batch([n]), 0, 0).split(",")[0] for n in range(12)} for rows, _ in found]
    assert names == [{str(folder / name) for name in of} for of in (("a", "b"), ("c", "a"), ("copies/a", "b"), ("copies/a", "b"))]
    assert [sorted(validation) for _, validation in found] == [["a", "b"], ["a", "c"], ["a", "b"], ["a", "b"]]
    every = [tuple(row) for of_phase in rows for row in of_phase]
    assert len(set(every)) == len(every) == 48
    _, alone = opened(folder, tokenizer, [{"global_batch_size": 4}] * 4)
    assert rows[0] == tokens_of(alone[0][0]), "what comes later does not change the rows of the first phase"

    moved = [{}, {"blend": [source("c"), source("copies/a", 3)]}, {"blend": [source("a"), source("b")]}, {}]
    _, again = opened(folder, tokenizer, moved)
    assert [tokens_of(training) for training, _ in again] == rows, "content decides, and not where it stands"
    for training, _ in found:
        for other, _ in again:
            other.load_state_dict(training.state_dict())  # also that of the phase before
    with pytest.raises(DataError, match="are not those this run began with"):
        found[3][0].load_state_dict(alone[0][0].state_dict())
    assert "48 rows of 16 tokens, " in data.describe_index()


def test_one_blend_in_all_phases_is_the_order_of_one_phase(folder, tokenizer):
    phases = [{}, {"blend": [source("a", 5), source("b", 5)]}, {"sequence_length": 8}, {}]
    _, found = opened(folder, tokenizer, phases)
    _, whole = opened(folder, tokenizer, [{}])
    rows, _ = whole[0]
    order = [row for number in (0, 1, 3) for row in tokens_of(found[number][0])]
    assert order[:12] == tokens_of(rows) and len({tuple(row) for row in order}) == 36
    assert all(training.state_dict() == rows.state_dict() for training, _ in found), "as before there were blends of phases"


def test_a_run_goes_on_with_phases_that_were_added_and_with_no_other_order(folder, tokenizer):
    def phases(count: int) -> list[dict]:
        of_all = [{}, {"blend": [source("c"), source("a", 3)]}, {"sequence_length": 8}, {"blend": [source("b")]}]
        return of_all[:count]

    saved = [opened(folder, tokenizer, phases(count))[1][-1][0] for count in range(1, 5)]
    rows = [tokens_of(training) for training in saved]
    for count in range(1, 5):
        _, found = opened(folder, tokenizer, phases(count))
        assert [tokens_of(training) for training, _ in found] == rows[:count], "no row of the phases before is another"
        for ended in range(1, count + 1):
            state = saved[ended - 1].state_dict()
            for training, _ in found[ended - 1 : ended + 1]:  # it stopped in its last phase, or at the end of it
                training.load_state_dict(state)
    _, found = opened(folder, tokenizer, phases(4))
    with pytest.raises(DataError, match="are not those"):
        found[2][0].load_state_dict(saved[0].state_dict())  # whose second phase is missing
    _, found = opened(folder, tokenizer, [{}, {"blend": [source("b")]}, {}])
    with pytest.raises(DataError, match="are not those"):
        found[2][0].load_state_dict(saved[1].state_dict())
    _, found = opened(folder, tokenizer, phases(4), "seed=1")
    for training, _ in found:
        for before in saved:
            with pytest.raises(DataError, match="are not those"):
                training.load_state_dict(before.state_dict())


def test_the_middle_of_a_share_of_the_documents_stands_at_the_end_in_training_alone(folder, tokenizer):
    settings = ("pretrain.validation.interval=1", "pretrain.fill_in_middle_rate=0.5", "pretrain.mask_documents=true")
    begin = tokenizer.find_token(MARKS[0][0])
    _, [(rows, validation)] = opened(folder, tokenizer, [{}], *settings)
    _, [(plain, plain_validation)] = opened(folder, tokenizer, [{}], *settings[:1], settings[2])
    assert begin in tokens_of(rows)[0] and begin not in tokens_of(plain)[0]
    for name in ("a", "b"):
        held = [of[name].rows.micro_batch(range(5)).token_ids for of in (validation, plain_validation)]
        assert held[0].equal(held[1])
    with pytest.raises(DataError, match="are not those"):
        rows.load_state_dict(plain.state_dict())


def test_what_does_not_fit_is_one_line(folder, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"^pretrain\.phases\.1\.blend is set and data\.blend is not"):
        opened(folder, tokenizer, [{}, {"blend": [source("a")]}], "data.blend=[]")
    with pytest.raises(DataError, match="none.idx: cannot be read"):
        opened(folder, tokenizer, [{}, {"blend": [source("none")]}])
    index, short = [f"data.index_cache={tmp_path / 'index'}"], write_source(tmp_path / "short", numbered_documents(2, 5))
    with pytest.raises(
        DataError, match=r"leaves 2 documents of \d+ tokens of .*short to train on: a row is 16 tokens and one more"
    ):
        opened(folder, tokenizer, [{}, {"blend": [{"path": short}]}], *index)
    with pytest.raises(DataError, match="leaves 0 documents of 0 tokens of .* to validate with"):
        opened(folder, tokenizer, [{}], *index, "data.split=[1, 0.00001]", "pretrain.validation.interval=1")
    assert not (tmp_path / "index").exists(), "all is looked at before anything is made"
    sentences = write_source(tmp_path / "sentences", numbered_documents(20, 5))
    index = tmp_path / "sentences.idx"
    content = bytearray(index.read_bytes()[: -8 * 21])
    content[26:34] = (11).to_bytes(8, "little")
    index.write_bytes(bytes(content) + np.arange(0, 21, 2, np.int64).tobytes())  # two sequences a document
    opened(folder, tokenizer, [{"blend": [{"path": sentences}]}])
    with pytest.raises(DataError, match="has 20 sequences of 10 documents, and pretrain.fill_in_middle_rate=0.1"):
        opened(folder, tokenizer, [{"blend": [{"path": sentences}]}], "pretrain.fill_in_middle_rate=0.1")


def test_an_artifact_notes_the_index_of_every_source():
    config = load_config(None, ["data.blend=[a]", "pretrain.phases=[{updates: 1}, {updates: 1, blend: [x/b, c]}]"])
    key = "pretrain.phases.1.blend"
    assert blend_indices(config) == {"data.blend.0.idx": "a.idx", f"{key}.0.idx": "x/b.idx", f"{key}.1.idx": "c.idx"}
