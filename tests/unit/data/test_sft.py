"""Conversations on their way to training samples: masks, too long and malformed ones, the folder they are kept in."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.config.sft import SftConfig, SftSource
from megatron_r1.data.chat.template import describe_sample
from megatron_r1.data.sample_store import SampleStore, write_store
from megatron_r1.data.sft import PREVIEW, SftData, prepare_sft
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import TrainingSample
from tests.paths import ROOT


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tally_tokenizer()


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> SftSource:
    lines = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in pairs]
    path.write_text("".join(lines))
    return SftSource(path=str(path))


def load(folder: Path, tokenizer: Tokenizer, template: str = "r1_zero", seed: int = 0, **settings) -> SftData:
    config = SftConfig(**settings)
    prepare_sft(config, DataConfig(template=template), tokenizer, folder / "data")
    return SftData(folder / "data", config, seed)


def test_loss_is_on_the_response_and_its_end_only(tokenizer, tmp_path):
    pairs = [("Total 7+5-2+1-3?", "<think>first 12</think><answer>8</answer>"), ("<eos><think>", "No.<eos>")]
    source = write_pairs(tmp_path / "pairs.jsonl", pairs)
    data = load(tmp_path, tokenizer, sources=[source])
    assert data.epoch_size == 2
    for (question, response), sample in zip(pairs, data.take([0, 1]), strict=True):
        prompt = tokenizer.encode_prompt("r1_zero", question)[1]
        ids = sample.token_ids.tolist()
        trained = [token for token, trained in zip(ids[1:], sample.loss_mask, strict=True) if trained]
        assert ids[: len(prompt)] == prompt
        assert trained == ids[len(prompt) :]
        assert tokenizer.decode(trained) == response
        assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
    assert "⟦<think>first 12</think><answer>8</answer><eos>⟧" in (tmp_path / "data" / PREVIEW).read_text()


def test_one_source_may_stand_in_data_source(tokenizer, tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", [("a", "b")])
    prepare_sft(SftConfig(), DataConfig(source=source.path), tokenizer, tmp_path / "data")
    assert SftData(tmp_path / "data", SftConfig(), 0).epoch_size == 1


@pytest.mark.parametrize(("overlong", "kept"), [("drop", [2, 2]), ("truncate", [2, 12, 2])])
def test_too_long_samples_are_counted_and_handled_as_configured(tokenizer, tmp_path, overlong, kept):
    """Of the two long ones, one has its question alone within the limit."""
    long = " ".join(["b"] * 60)
    source = write_pairs(tmp_path / "pairs.jsonl", [("a", "b"), ("a", long), ("a", "b"), (long, "b")])
    data = load(tmp_path, tokenizer, sources=[source], overlong=overlong, max_tokens=16)
    samples = data.take(range(len(kept)))
    assert data.epoch_size == len(kept)
    assert [sample.num_trained for sample in samples] == kept
    assert max(sample.num_targets for sample in samples) <= 16
    counts = data.counts[0]
    assert (counts.samples, counts.dropped, counts.truncated) == (len(kept), 4 - len(kept), len(kept) - 2)
    assert data.dropped == 4 - len(kept) and f"{4 - len(kept)} dropped and {len(kept) - 2} truncated" in data.describe()
    if overlong == "truncate":
        assert samples[1].token_ids[-1] != tokenizer.eos_id, "a cut response is not taught to end there"


def test_a_sample_as_long_as_the_limit_is_kept(tokenizer, tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", [("a", "b c d")])
    length = load(tmp_path, tokenizer, sources=[source]).take([0])[0].num_targets
    assert load(tmp_path, tokenizer, sources=[source], max_tokens=length).dropped == 0
    with pytest.raises(DataError, match=f"{length} tokens are more than sft.max_tokens={length - 1}"):
        load(tmp_path, tokenizer, sources=[source], max_tokens=length - 1)


def test_bad_conversations_are_one_line_errors_and_leave_nothing(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    for text, says in (
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', r"pairs.jsonl:2: field 'response' is missing"),
        (json.dumps({"prompt": "a", "response": "b " * 100}), r"pairs.jsonl:1: \d+ tokens are more than sft.max_tokens=50"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"pairs.jsonl:1: data.template=r1_zero holds one question"),
        ('{"prompt": "a", "response": "b"}\n{"prompt"\n', r"pairs.jsonl:2: bad JSON"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=says) as caught:
            load(tmp_path, tokenizer, sources=[SftSource(path=str(path))], micro_batch_tokens=50)
        assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()


def test_malformed_conversations_are_skipped_where_that_is_asked_for_but_broken_files_are_not(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}\n{"messages": [{"role": "x"}]}\n')
    data = load(tmp_path, tokenizer, sources=[SftSource(path=str(path))], invalid="skip")
    assert data.epoch_size == 1 and data.counts[0].skipped == 2 and "2 malformed skipped" in data.describe()
    path.write_text('{"prompt": "a", "response": ""}\n')
    with pytest.raises(DataError, match="chat.jsonl: nothing to train on: 0 dropped, 1 skipped"):
        load(tmp_path, tokenizer, sources=[SftSource(path=str(path))], invalid="skip")
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt"\n')
    with pytest.raises(DataError, match="chat.jsonl:2: bad JSON"):
        load(tmp_path, tokenizer, sources=[SftSource(path=str(path))], invalid="skip")


def test_sources_are_mixed_by_weight(tokenizer, tmp_path):
    a = write_pairs(tmp_path / "a.jsonl", [(f"a {i}", "a") for i in range(30)])
    b = write_pairs(tmp_path / "b.jsonl", [(f"b {i}", "b") for i in range(10)])
    everything = load(tmp_path, tokenizer, sources=[a, b])
    assert sorted(everything.epoch(0)) == list(range(40))
    weighted = [source.model_copy(update={"weight": weight}) for source, weight in ((a, 1.0), (b, 3.0))]
    data = load(tmp_path, tokenizer, sources=weighted)
    numbers = data.epoch(0)
    assert sorted(n >= 30 for n in numbers) == [False] * 10 + [True] * 30
    assert load(tmp_path, tokenizer, sources=weighted, seed=1).epoch(0) != numbers
    with pytest.raises(ConfigError, match="give every source a weight, or none"):
        load(tmp_path, tokenizer, sources=[weighted[0], b])


def test_validation_never_meets_training(tokenizer, tmp_path):
    pairs = [(f"question {i % 60}", f"answer {i}") for i in range(120)]
    data = load(tmp_path, tokenizer, sources=[write_pairs(tmp_path / "a.jsonl", pairs)], validation_fraction=0.3)
    length = len(tokenizer.encode_prompt("r1_zero", "question 1")[1])
    train = {tuple(sample.token_ids[:length]) for sample in data.take(data.epoch(0))}
    validation = data.validation()
    assert len(validation) + data.epoch_size == 120 and 20 <= len(validation) <= 60
    assert not train & {tuple(sample.token_ids[:length]) for sample in validation}, "also where a question comes twice"
    few = load(
        tmp_path, tokenizer, sources=[SftSource(path=str(tmp_path / "a.jsonl"))], validation_fraction=0.3, validation_samples=7
    )
    assert len(few.validation()) == 7


def test_a_validation_file(tokenizer, tmp_path):
    train, held = write_pairs(tmp_path / "a.jsonl", [("a", "b")] * 3), write_pairs(tmp_path / "v.jsonl", [("v", "v"), ("w", "w")])
    data = load(tmp_path, tokenizer, sources=[train], validation=held)
    assert data.epoch_size == 3 and len(data.validation()) == 2
    assert [describe_sample(s, tokenizer)[-8:] for s in data.validation()] == ["⟦v<eos>⟧", "⟦w<eos>⟧"]
    with pytest.raises(ConfigError, match="both set"):
        load(tmp_path, tokenizer, sources=[train], validation=held, validation_fraction=0.5)


def test_the_folder_is_made_once_and_again_where_anything_changed(tokenizer, tmp_path):
    source = write_pairs(tmp_path / "a.jsonl", [("a", "b"), ("c", "d")])
    first = load(tmp_path, tokenizer, sources=[source])
    stamp = (tmp_path / "data/store.json").stat().st_ino
    assert load(tmp_path, tokenizer, sources=[source]).fingerprint == first.fingerprint
    assert (tmp_path / "data/store.json").stat().st_ino == stamp
    other = load(tmp_path, tokenizer, template="r1_chat", sources=[source])
    assert other.fingerprint != first.fingerprint
    write_pairs(tmp_path / "a.jsonl", [("a", "b"), ("c", "D")])
    changed = load(tmp_path, tokenizer, sources=[source])
    changed.check_same(None)
    with pytest.raises(DataError, match="the conversations are not those this run began with"):
        changed.check_same({"samples": first.fingerprint})
    write_pairs(tmp_path / "a.jsonl", [("a", "b"), ("c", "d")])
    load(tmp_path, tokenizer, sources=[source]).check_same({"samples": first.fingerprint})
    (tmp_path / "data/tokens.bin").write_bytes(b"")
    with pytest.raises(DataError, match="data: tokenised samples cannot be read"):
        load(tmp_path, tokenizer, sources=[source])


@pytest.mark.slow
def test_a_process_of_its_own_makes_the_same_samples(tokenizer, tmp_path):
    sources = [write_pairs(tmp_path / f"{name}.jsonl", [(f"{name} {i}", f"<think>{i}") for i in range(300)]) for name in "ab"]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"prompt": "a"}\n')
    here = load(tmp_path, tokenizer, sources=sources, invalid="skip")
    (tmp_path / "data/store.json").unlink()
    there = load(tmp_path, tokenizer, sources=sources, invalid="skip", workers=1)
    assert there.fingerprint == here.fingerprint and there.epoch_size == 600 and there.counts == here.counts


def test_stored_samples_come_back_as_they_were(tmp_path):
    rng = random.Random(0)
    samples = []
    for number in range(50):
        length = rng.randint(2, 20)
        sample = TrainingSample([rng.randint(0, 200_000) for _ in range(length)], [rng.randint(0, 1) for _ in range(length - 1)])
        samples.append((number % 3 - 1, sample))
    samples.append((0, TrainingSample([5, 6], [0])))
    write_store(tmp_path / "store", iter(samples), {"more": 1})
    store = SampleStore(tmp_path / "store")
    assert len(store) == 51 and store.description["more"] == 1
    assert store.groups.tolist() == [group for group, _ in samples]
    for index, (_, sample) in enumerate(samples):
        assert (store[index].token_ids.tolist(), store[index].loss_mask.tolist()) == (
            sample.token_ids.tolist(),
            sample.loss_mask.tolist(),
        )
    assert (tmp_path / "store/tokens.bin").stat().st_size == 4 * sum(len(sample.token_ids) for _, sample in samples)


def test_sources_on_the_command_line():
    config = load_config(None, ["sft.sources=[a.jsonl, {path: b.jsonl, weight: 2.0}]", "sft.validation=v.jsonl"])
    assert config.sft.sources == [SftSource(path="a.jsonl"), SftSource(path="b.jsonl", weight=2.0)]
    assert config.sft.validation == SftSource(path="v.jsonl")
    assert Config.model_validate(config.model_dump(), strict=True) == config
    with pytest.raises(ConfigError, match="'sft.sources.0.wieght' on the command line is 2"):
        load_config(None, ["sft.sources=[{path: a, wieght: 2}]"])


def test_a_limit_beyond_a_forward_pass_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="there are no conversations"):
        load(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="sft.max_tokens=9 is more than sft.micro_batch_tokens=8"):
        load(tmp_path, tokenizer, sources=[SftSource(path="a.jsonl")], max_tokens=9, micro_batch_tokens=8)


def test_the_preset_is_the_recipe_s():
    """Two epochs, lr 5e-6 with cosine to a tenth, batch 64, 32,768 tokens (R1 v2 B.4.2), from V3-Base in R1's chat template."""
    config = load_config(ROOT / "examples/v3_671b/stage3.yaml", ["model.weights=base", "sft.sources=[curated.jsonl]"])
    stage, optimizer = config.sft, config.sft.optimizer
    assert (stage.epochs, stage.batch_size, stage.max_tokens, stage.micro_batch_tokens) == (2, 64, 32768, 32768)
    assert (optimizer.lr, optimizer.lr * optimizer.min_lr_ratio, optimizer.schedule) == (5e-6, pytest.approx(5e-7), "cosine")
    assert (config.model.preset, config.data.template) == ("671b", "r1_chat")


def test_which_turns_are_trained_is_a_setting_and_a_field(tokenizer, tmp_path):
    turns = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    silent = [{**turn, "weight": 0} for turn in turns]
    lines = [{"messages": turns}, {"messages": [*turns[:2], *silent[2:]]}, {"messages": silent}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SftSource(path=str(tmp_path / "chat.jsonl"))

    def trained(**settings) -> list[str]:
        data = load(tmp_path, tokenizer, template="r1_chat", sources=[source], **settings)
        assert data.counts[0].untrained == 3 - data.epoch_size and "not to be trained on" in data.describe()
        shown = [describe_sample(sample, tokenizer) for sample in data.take(range(data.epoch_size))]
        return ["".join(part.partition("⟧")[0] for part in text.split("⟦")[1:]) for text in shown]

    assert trained() == ["b<eos>d<eos>", "b<eos>"]
    assert trained(trained_turns="last") == ["d<eos>"]


def test_a_sample_is_named_by_its_place_in_its_source(tokenizer, tmp_path):
    sources = [write_pairs(tmp_path / name, [(f"{name} {n}?", f"{n}") for n in range(3)]) for name in ("one.jsonl", "two.jsonl")]
    data = load(tmp_path / "store", tokenizer, sources=sources)
    names = [sample.name for sample in data.take(range(6))]
    assert names == [f"sample {n + 1} of {tmp_path / name}" for name in ("one.jsonl", "two.jsonl") for n in range(3)]
