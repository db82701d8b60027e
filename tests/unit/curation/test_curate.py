"""Near-duplicates, decontamination, mixing, and the command that puts them together."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_r1 import cli
from megatron_r1.config.curation import CurationConfig, DecontaminationConfig, DedupConfig, MixConfig
from megatron_r1.config.load import load_config
from megatron_r1.curation.curate import curate_files
from megatron_r1.curation.decontaminate import EvaluationSets, Match
from megatron_r1.curation.dedup import NearDuplicates, Signer
from megatron_r1.curation.proportions import draw, plan_mix
from megatron_r1.curation.words import hash_ngrams, words_of
from megatron_r1.errors import DataError
from tests.paths import ROOT
from tests.public_data import KINDS, math_records


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def record(number: int, text: str = "", domain: str = "math", **fields) -> dict:
    # Enough words of its own that no two records are alike.
    words = " ".join(f"word{random.Random(f'{number} {n}').randrange(10**6)}" for n in range(20))
    messages = [
        {"role": "user", "content": text or f"Question {number}: {words}?"},
        {"role": "assistant", "content": f"<think>\nI think about {words}.\n</think>\n\nThe answer is {number}."},
    ]
    return {"id": f"r{number}", "messages": messages, "domain": domain, "language": "en", "outcome": "correct", **fields}


# Words


def test_words_ignore_case_punctuation_and_space_and_split_chinese_into_characters():
    assert words_of("The  Cat's $x^2$, 48_000!\n") == ["the", "cat", "s", "x", "2", "48", "000"]
    assert words_of("小明有3颗candy") == ["小", "明", "有", "3", "颗", "candy"]


def test_ngram_hashes_depend_on_the_words_and_their_order_and_on_nothing_else():
    words = [str(n % 7) for n in range(30)]
    hashes = hash_ngrams(words, 3).tolist()
    runs = [tuple(words[i : i + 3]) for i in range(28)]
    assert len(hashes) == 28 and [hashes[i] == hashes[j] for i in range(28) for j in range(28)] == [
        runs[i] == runs[j] for i in range(28) for j in range(28)
    ]
    assert hash_ngrams(["a", "b"], 2) != hash_ngrams(["b", "a"], 2) and hash_ngrams(["a"], 2).size == 0
    code = "from megatron_r1.curation.words import hash_ngrams; print(hash_ngrams(['a', 'b', 'c'], 2).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(other.stdout) == hash_ngrams(["a", "b", "c"], 2).tolist(), "the same in another process"


# Near-duplicates


def jaccard(first: str, second: str, ngram: int) -> float:
    a, b = (set(hash_ngrams(words_of(text), ngram).tolist()) for text in (first, second))
    return len(a & b) / len(a | b)


def test_signatures_estimate_the_jaccard_similarity():
    signer = Signer(DedupConfig(permutations=256, ngram=1), seed=1)
    random.seed(2)
    errors = []
    for _ in range(40):
        shared = random.randrange(5, 200)
        first = " ".join(f"w{n}" for n in range(200))
        second = " ".join(f"w{n}" for n in range(200 - shared, 400 - shared))
        errors.append((signer.sign(first) == signer.sign(second)).mean() - jaccard(first, second, 1))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.05  # 1 / (2 sqrt(256)) = 0.03


def find_all(texts: list[str], config: DedupConfig, seed: int = 0) -> dict[int, int]:
    signer, known = Signer(config, seed), NearDuplicates(config)
    found = {index: known.find(index, signer.sign(text)) for index, text in enumerate(texts)}
    return {index: match[0] for index, match in found.items() if match}


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_near_duplicates_are_found_and_distinct_texts_are_kept(kind, seed):
    config = DedupConfig()
    texts = [record["question"] for record in math_records(kind)[:2000]]
    generator = random.Random(seed)
    planted = []
    for original in generator.sample(range(2000), 200):
        words = texts[original].split()
        if len(words) < 40:  # a word more in a short text is no small change
            continue
        at = generator.randrange(len(words))
        changed = (
            " ".join([*words[:at], "indeed", *words[at + 1 :]]) if generator.random() < 0.5 else texts[original].upper() + " ..."
        )
        planted.append((original, changed))
    found = find_all(texts + [changed for _, changed in planted], config, seed)
    alike = {index for index, (original, changed) in enumerate(planted) if jaccard(texts[original], changed, 5) >= 0.85}
    missed = [index for index in alike if 2000 + index not in found]
    assert len(alike) > 50 and len(missed) <= 0.03 * len(alike)
    for index, other in found.items():
        if index < 2000:
            assert jaccard(texts[index], texts[other], 5) > 0.6, (texts[index], texts[other])


def test_exact_repeats_short_and_wordless_texts_are_told_apart():
    found = find_all(["Hello!", "hello", "Hi", "??", "!!", "??", "小明", "小红"], DedupConfig())
    assert found == {1: 0, 5: 3}


def test_near_duplicates_take_linear_time_where_all_texts_share_a_template():
    signer = Signer(DedupConfig(threshold=0.95), 0)
    shared = " ".join(f"template{n}" for n in range(60))
    signatures = [signer.sign(f"{shared} {n} {n * 7} {n * 13} {n * 17} {n * 19}") for n in range(1200)]

    def seconds(count: int) -> float:
        known = NearDuplicates(DedupConfig(threshold=0.95))
        started = time.process_time()
        for index in range(count):
            known.find(index, signatures[index])
        return time.process_time() - started

    assert seconds(1200) < 8 * max(seconds(300), 0.005)  # quadratic: 16 times


# Decontamination


def test_a_planted_ngram_is_found_whatever_its_case_punctuation_and_line_breaks():
    sets = EvaluationSets.of(
        {"a": ["One two, three four five six seven eight NINE ten eleven."], "zh": ["小明有二十四颗糖果要分给朋友"]}, 10
    )
    assert sets.match("x y two THREE\nfour-five: six seven eight nine (ten) eleven z", "") == Match(
        "a", "two three four five six seven eight nine ten eleven"
    )
    assert sets.match("one two three four five six seven eight nine", "") is None, "nine words are no 10-gram"
    assert sets.match("昨天，小明有二十四颗糖 果要", "").name == "zh"
    assert sets.match("小明有二十四颗", "") is None


def test_a_short_question_matches_a_prompt_with_just_its_words():
    sets = EvaluationSets.of({"short": ["What is 2 + 3?"]}, 10)
    assert sets.match("anything", "what is 2+3") == Match("short", "what is 2 3")
    assert sets.match("what is 2 + 3", "and then what is 2 + 3") is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_planted_questions_are_found_among_many_and_others_are_not(kind):
    texts = [record["question"] for record in math_records(kind)]
    sets = EvaluationSets.of({"test": texts[:500]}, 10)
    generator = random.Random(0)
    for question in generator.sample(texts[:500], 50):
        words = question.split()
        if len(words) >= 14:
            start = generator.randrange(len(words) - 12)
            planted = f"{texts[700]} {' '.join(words[start : start + 12])} {texts[800]}"
            assert sets.match(planted, planted) is not None, words
    shared = {run for text in texts[:500] for run in zip(*(words_of(text)[n:] for n in range(10)))}
    for text in texts[500:1500]:
        truth = any(run in shared for run in zip(*(words_of(text)[n:] for n in range(10))))
        assert (sets.match(text, text) is not None) == truth, "as an exact comparison of 10-grams says"


# Mixing


def test_a_mix_without_proportions_is_everything():
    assert plan_mix({"math": 3, "code": 5}, MixConfig()) == {"math": 3, "code": 5}


@pytest.mark.parametrize("seed", range(20))
def test_mixes_meet_their_proportions_within_one_record(seed):
    generator = random.Random(seed)
    available = {domain: generator.randrange(1, 500) for domain in ("math", "code", "stem", "logic")}
    weights = {domain: generator.choice([0.1, 1, 3, 395285]) for domain in available}
    for sampling in ("down", "up"):
        counts = plan_mix(available, MixConfig(proportions=weights, sampling=sampling, max_copies=10**9))
        total = sum(counts.values())
        for domain, count in counts.items():
            assert abs(count - total * weights[domain] / sum(weights.values())) < 1
            assert count <= available[domain] if sampling == "down" else count >= available[domain]


def test_records_come_as_often_as_each_other_and_the_seed_decides_which():
    domains = ["math"] * 5 + ["code"] * 10
    drawn = draw(domains, {"math": 12, "code": 4}, seed=3)
    copies = Counter(index for index, _ in drawn)
    assert sorted(copies[index] for index in range(5)) == [2, 2, 2, 3, 3]
    assert sum(copies[index] for index in range(5, 15)) == 4 and max(copies[index] for index in range(5, 15)) == 1
    assert len(set(drawn)) == 16, "copies are numbered"
    assert draw(domains, {"math": 12, "code": 4}, seed=3) == drawn != draw(domains, {"math": 12, "code": 4}, seed=4)


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ({"proportions": {"math": 1}}, "there are records of domain 'code'"),
        ({"proportions": {"math": 1, "code": 1, "stem": 1}}, "no record of domain 'stem' is left to mix"),
        ({"proportions": {"math": 1, "code": 1}, "total": 30}, "needs 15 records of domain 'math' and there are 10"),
        ({"proportions": {"math": 9, "code": 1}, "sampling": "up"}, "needs 90 records of domain 'math' and there are 10"),
        ({"proportions": {"math": 0, "code": 0}}, "all of curation.mix.proportions are 0"),
        ({"proportions": {"math": -1, "code": 1}}, "curation.mix.proportions.math is -1"),
    ],
)
def test_proportions_that_cannot_be_met_say_why(mix, says):
    available = {"math": 10, "code": 10}
    with pytest.raises(DataError, match=says):
        plan_mix(available, MixConfig(**mix))


def test_the_recipe_s_mix_is_its_table():
    config = load_config(ROOT / "examples/v3_671b/stage3_data.yaml").curation
    table = {"math": 395285, "code": 211129, "stem": 10124, "logic": 10395, "general": 177812}
    assert config.mix.proportions == table and config.mix.total == sum(table.values()) == 804745
    assert plan_mix(dict.fromkeys(table, 10**6), config.mix) == table and config.decontamination.ngram == 10


# The command


@pytest.mark.slow
def test_curate_does_all_of_it_counts_all_of_it_and_gives_the_same_with_more_processes(tmp_path):
    evaluation = write(
        tmp_path / "aime.jsonl", {"problem": "how many ways are there to order ten different red books on one shelf"}
    )
    records = [record(n, domain="math" if n < 30 else "code") for n in range(40)]
    records[3]["outcome"] = "wrong"
    records[4]["messages"][1]["content"] = "no reasoning at all"
    records[31]["messages"][0]["content"] = "Say HOW MANY ways are there, to order ten different red books?"
    repeated = record(5) | {"id": "again"}
    source = write(tmp_path / "in.jsonl", *records, repeated)
    settings = {"inputs": [str(source)], "decontamination": {"evaluation_sets": {"aime": str(evaluation)}},
                "mix": {"proportions": {"math": 2, "code": 1}}}  # fmt: skip
    summary = curate_files(CurationConfig(**settings), 7, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"] == {
        "read": {"math": 31, "code": 10},
        "filtered": {"correct": {"math": 1}, "well_formed": {"math": 1}},
        "duplicates": {"math": 1},
        "contaminated": {"aime": {"code": 1}},
        "left": {"math": 28, "code": 9},
        "mixed": {"math": 18, "code": 9},
    }
    assert manifest["matches"] == {"aime": [{"words": "how many ways are there to order ten different red", "records": 1}]}
    dropped = {line["id"]: (line["step"], line["name"]) for line in map(json.loads, (tmp_path / "out/rejected.jsonl").open())}
    assert dropped == {"r3": ("filter", "correct"), "r4": ("filter", "well_formed"), "again": ("duplicate", "near_duplicate"),
                       "r31": ("contamination", "aime")}  # fmt: skip
    kept = [json.loads(line) for line in (tmp_path / "out/curated.jsonl").open()]
    originals = {known["id"]: known | {"source": "in"} for known in records}
    assert len(kept) == 27 and all(line == originals[line["id"]] for line in kept), "records pass unchanged"
    assert "| - filter: correct" in summary and "66.7%" in summary and summary == (tmp_path / "out/summary.md").read_text()

    curate_files(CurationConfig(**settings, workers=2), 7, tmp_path / "two")
    assert (tmp_path / "two/curated.jsonl").read_bytes() == (tmp_path / "out/curated.jsonl").read_bytes()
    assert (tmp_path / "two/rejected.jsonl").read_bytes() == (tmp_path / "out/rejected.jsonl").read_bytes()


def test_a_finished_folder_is_left_alone_until_something_changes(tmp_path):
    source = write(tmp_path / "in.jsonl", *map(record, range(5)))
    config = CurationConfig(inputs=[str(source)], mix={"proportions": {"math": 1}, "total": 12, "sampling": "up"})
    curate_files(config, 0, tmp_path / "out")
    ids = [json.loads(line)["id"] for line in (tmp_path / "out/curated.jsonl").open()]
    assert len(set(ids)) == 12 and {id.partition("#")[0] for id in ids} == {f"r{n}" for n in range(5)}, (
        "copies have ids of their own"
    )
    made = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    curate_files(config, 0, tmp_path / "out")
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == made
    (tmp_path / "out/curated.jsonl").write_text("damaged")
    curate_files(config, 0, tmp_path / "out")
    assert len((tmp_path / "out/curated.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"messages": [], "id": "a"}'], "in.jsonl:1"),
        ([json.dumps(record(1)), "{"], "in.jsonl:2: bad JSON"),
        ([json.dumps(record(1)), json.dumps(record(1))], "in.jsonl:2: the id 'r1' stands already at .*in.jsonl:1"),
        ([json.dumps(record(1) | {"messages": [{"role": "robot", "content": "x"}]})], "in.jsonl:1 .*robot"),
        ([json.dumps(record(1) | {"outcome": "wrong"})], "no record is left of 1: filter correct dropped 1"),
        ([], "the file is empty"),
    ],
)
def test_what_is_wrong_with_the_input_is_told_on_one_line(tmp_path, lines, says):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=says) as caught:
        curate_files(CurationConfig(inputs=[str(source)]), 0, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.json*")), "nothing half-made is left"


def test_an_input_that_cannot_be_read_by_offsets_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"in.jsonl.gz: expected a .jsonl file"):
        curate_files(CurationConfig(inputs=[str(tmp_path / "in.jsonl.gz")]), 0, tmp_path / "out")


def test_an_item_of_an_evaluation_set_without_a_question_is_named(tmp_path):
    evaluation = write(tmp_path / "set.jsonl", {"question": "fine"}, {"answer": "7"})
    source = write(tmp_path / "in.jsonl", record(1))
    config = CurationConfig(inputs=[str(source)], decontamination=DecontaminationConfig(evaluation_sets={"s": str(evaluation)}))
    with pytest.raises(DataError, match=r"set.jsonl:2: none of the fields question, problem, prompt, text is there"):
        curate_files(config, 0, tmp_path / "out")


def test_the_command_reads_its_settings_and_prints_the_table(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", *map(record, range(5)))
    assert cli.main(["curate", f"run_dir={tmp_path / 'out'}", f"curation.inputs=[{source}]"]) == 0
    assert "| in the mix" in capsys.readouterr().out
    assert cli.main(["curate", f"run_dir={tmp_path / 'out'}"]) == 2
    assert "curation.inputs is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["curate", "--help"])
    said = capsys.readouterr().out
    assert "curation.mix.proportions" in said and "curation.rejection" not in said
