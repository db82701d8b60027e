"""`megatron-r1 preprocess` as a whole: the same bytes whoever makes them, kills, and what is refused."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import struct
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from megatron_r1.cli import main
from megatron_r1.errors import DataError, R1Error
from megatron_r1.mcore import active, host
from megatron_r1.preprocess import commands, crew, merge, sources
from megatron_r1.preprocess.job import PreprocessJob, TokenOptions
from megatron_r1.preprocess.parts import PartWriter
from megatron_r1.preprocess.plan import _lock
from tests.preprocess_runs import TEXTS, ThreadComm, fail_or_die, many_texts, save_tokenizer, write_lines

COUNT = 160  # texts of a form
SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sources, "_LEAST_PART", 4096)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, save_tokenizer(folder)


@pytest.fixture
def corpus(tmp_path):
    """A folder with the same texts in every form, and what is no text beside them."""
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    texts = many_texts(COUNT)
    write_lines(folder / "a.jsonl", texts)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    packed = pyarrow.compress((folder / "a.jsonl").read_bytes(), "zstd", asbytes=True)
    (folder / "below/c.json.zst").write_bytes(packed)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(COUNT), "text": texts}), folder / "d.parquet", row_group_size=50)
    paragraphs = "\n\n".join(" ".join(text.split()) for text in texts)
    (folder / "e.txt").write_text(f"\n\n{paragraphs}\n", encoding="utf-8")
    (folder / "README.md").write_text("About this corpus.")
    (folder / "dataset_info.json").write_text("{}")
    return folder


def preprocess(tokenizer, output: Path, *arguments) -> int:
    return main(
        ["preprocess", "--tokenizer", str(tokenizer[0]), "--output-prefix", str(output), "--append-eod", *map(str, arguments)]
    )


def made(output: Path, level: str = "document") -> dict[str, bytes]:
    return {suffix: Path(f"{output}_text_{level}{suffix}").read_bytes() for suffix in SUFFIXES}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".parts" in path.name or ".tmp-" in path.name)


def megatron():
    if active.prepared_device() is None:
        host.activate("cpu")
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def in_ranks(monkeypatch, size: int, run) -> list:
    """What `run` returns or raises in each of several ranks of one job."""
    comms = ThreadComm.world(size)
    local = threading.local()
    monkeypatch.setattr(commands, "gather_crew", lambda launch, workers: crew.Ranks(local.comm))
    outcomes: list = [None] * size

    def rank(number: int) -> None:
        local.comm = comms[number]
        try:
            outcomes[number] = run()
        except R1Error as error:
            outcomes[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_every_number_of_processes_and_ranks_makes_the_same_files(tokenizer, corpus, tmp_path, monkeypatch, capsys):
    assert preprocess(tokenizer, tmp_path / "one", "--input", corpus) == 0
    alone = made(tmp_path / "one")
    assert preprocess(tokenizer, tmp_path / "two", "--input", corpus, "--workers", 2) == 0
    assert made(tmp_path / "two") == alone
    for size in (2, 7):
        out = tmp_path / f"ranks{size}"
        assert in_ranks(monkeypatch, size, lambda out=out: preprocess(tokenizer, out, "--input", corpus)) == [0] * size
        assert made(out) == alone
    assert leftovers(tmp_path) == []
    out = capsys.readouterr()
    assert "left aside in the folders: 2 files" in out.err and f"{5 * COUNT} documents" in out.out
    assert "about 0 s left, tokens=" in out.err and "tokens/s=" in out.err

    # Every form of the texts gives the same documents, those of Megatron's own reader.
    dataset = megatron().IndexedDataset(str(tmp_path / "one_text_document"))
    texts = many_texts(COUNT)
    own = tokenizer[1]
    for first, given in [(form * COUNT, texts) for form in range(4)]:
        order = [own.start_ids + own.encode_plain(text) + [own.eos_id] for text in given]
        assert [dataset[first + n].tolist() for n in range(COUNT)] == order
    assert own.decode(dataset[4 * COUNT].tolist()) == " ".join(texts[0].split())
    assert dataset.document_indices.tolist() == list(range(5 * COUNT + 1))
    note = json.loads(alone[".json"])
    assert note["tokenizer"] == own.fingerprint and note["tokens"] == sum(dataset.sequence_lengths) and note["dtype"] == "uint16"
    assert [Path(source["path"]).name for source in note["sources"]] == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.json.zst",
        "d.parquet",
        "e.txt",
    ]


def test_the_bytes_are_those_of_megatrons_builder_and_of_its_documented_layout(tokenizer, tmp_path):
    texts = many_texts(60)
    source = write_lines(tmp_path / "a.jsonl", texts)
    assert preprocess(tokenizer, tmp_path / "o", "--input", source, "--vocab-size", 70_000, "--no-bos") == 0
    own = tokenizer[1]
    documents = [own.encode_plain(text) + [own.eos_id] for text in texts]
    builder = megatron().IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=megatron().DType.optimal_dtype(70_000))
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    files = made(tmp_path / "o")
    assert files[".bin"] == (tmp_path / "m.bin").read_bytes() and files[".idx"] == (tmp_path / "m.idx").read_bytes()
    lengths = np.array([len(ids) for ids in documents], "<i4")
    places = np.concatenate([[0], np.cumsum(lengths[:-1].astype("<i8") * 4)])
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 60, 61)
    assert files[".idx"] == head + lengths.tobytes() + places.astype("<i8").tobytes() + np.arange(61, dtype="<i8").tobytes()


def test_sentences_are_sequences_as_megatron_lays_them_out(tokenizer, tmp_path):
    texts = [
        "One here. Two there!  Three?",
        ["given. as it is", "and so"],
        "他来了。他走了！",
        "Dr. No met J. S. Bach at 3.5 p.m. today.",
    ]
    source = write_lines(tmp_path / "a.jsonl", texts)
    assert preprocess(tokenizer, tmp_path / "o", "--input", source, "--split-sentences", "--no-bos") == 0
    own = tokenizer[1]
    split = [["One here.", "Two there!", "Three?"], texts[1], ["他来了。", "他走了！"], [texts[3]]]
    builder = megatron().IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for sentences in split:
        ids = [own.encode_plain(sentence) for sentence in sentences]
        ids[-1] = [*ids[-1], own.eos_id]
        builder.add_document(torch.tensor([token for one in ids for token in one]), [len(one) for one in ids])
    builder.finalize(str(tmp_path / "m.idx"))
    files = made(tmp_path / "o", "sentence")
    assert files[".bin"] == (tmp_path / "m.bin").read_bytes() and files[".idx"] == (tmp_path / "m.idx").read_bytes()


def test_bad_documents_end_it_or_are_left_out_and_counted(tokenizer, tmp_path, capsys):
    lines = [json.dumps({"text": text}).encode() for text in many_texts(60)]
    bad = {
        4: (b'{"text": 7}', "field 'text' is int, not text"),
        5: (b'{"text": ""}', "an empty document"),
        18: (b'{"body": "x"}', "field 'text' is missing; the record has 'body'"),
        19: (b'{"text": null}', "field 'text' has no value"),
        30: (b"\xff\xfe", "not UTF-8 text (byte 0 of the line)"),
        31: (b'{"text": "a', "bad JSON"),
        32: (b"[1]", "expected an object, found list"),
        33: (b'{"text": "\\ud800"}', "half a surrogate pair"),
        50: (b'{"text": "' + b"long " * 300_000 + b'"}', "longer than 1 MB"),
        59: (b'{"text": "' + b"longer " * 1_200_000 + b'"}', "longer than 6 MB"),
    }
    source = tmp_path / "a.jsonl"
    for number, (line, message) in bad.items():
        lines_with_one = [line if n == number else good for n, good in enumerate(lines)]
        source.write_bytes(b"\n".join(lines_with_one))
        assert preprocess(tokenizer, tmp_path / f"o{number}", "--input", source, "--most-document-mb", 1) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"a.jsonl:{number + 1}: " in error and message in error and "--skip-bad" in error
        assert not list(tmp_path.glob(f"o{number}*.bin"))
    for number, (line, _) in bad.items():
        lines[number] = line
    source.write_bytes(b"\n".join(lines))
    assert preprocess(tokenizer, tmp_path / "o", "--input", source, "--most-document-mb", 1) == 2
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "o_text_document.idx").exists()
    # What was finished by then is kept.
    arguments = ("--input", source, "--most-document-mb", 1, "--skip-bad")
    assert preprocess(tokenizer, tmp_path / "o", *arguments) == 0
    printed = capsys.readouterr()
    assert "50 documents" in printed.out and "left out: 10 bad" in printed.out and "and 5 more in" in printed.err
    left = [json.loads(line) for line in (tmp_path / "o_text_document.left_out.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in left] == [f"{source}:{number + 1}" for number in bad]
    assert all(message in entry["detail"] for entry, (_, message) in zip(left, bad.values(), strict=True))
    assert json.loads(made(tmp_path / "o")[".json"])["left_out"] == {"bad": 10}


def test_contaminated_documents_and_near_duplicates_are_left_out(tokenizer, tmp_path, monkeypatch, capsys):
    texts = many_texts(200, seed=5)
    texts[150] = texts[3] = " ".join(f"word{n}" for n in range(60))
    question = "how many clips did Natalia sell altogether in April and May"
    texts[120] = f"Some text. {question.upper()}? And more."
    write_lines(tmp_path / "eval.jsonl", [question], "question")
    inputs = ("--input", write_lines(tmp_path / "a.jsonl", texts[:100]), write_lines(tmp_path / "b.jsonl", texts[100:]))
    options = (*inputs, "--dedup", 0.9, "--decontaminate", f"quiz={tmp_path / 'eval.jsonl'}")
    assert preprocess(tokenizer, tmp_path / "o", *options) == 0
    outcomes = in_ranks(monkeypatch, 3, lambda: preprocess(tokenizer, tmp_path / "r", *options))
    assert outcomes == [0, 0, 0] and made(tmp_path / "r") == made(tmp_path / "o")
    left = [json.loads(line) for line in (tmp_path / "o_text_document.left_out.jsonl").read_text().splitlines()]
    found = {(Path(entry["where"]).name, entry["reason"]): entry["detail"] for entry in left}
    lines = {n: 1 + n + -(-n // 7) for n in range(100)}  # `write_lines` leaves blank ones
    assert found["b.jsonl:" + str(lines[20]), "contaminated"].startswith("quiz: how many clips did natalia sell")
    assert f"similar to {tmp_path / 'a.jsonl'}:{lines[3]} (1.00)" == found["b.jsonl:" + str(lines[50]), "near-duplicate"]
    counts = json.loads(made(tmp_path / "o")[".json"])["left_out"]
    assert counts["contaminated"] == 1 and counts["near-duplicate"] == len(left) - 1


def killed_in(owner, name: str, at: int, after: bool, run) -> int:
    """Run in a forked process that kills itself at the `at`-th call of a function, before it or after it. Returns its status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    original = getattr(owner, name)
    calls = [0]

    def kills(*arguments, **named):
        calls[0] += 1
        if calls[0] == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, kills)
    try:
        run()
    finally:
        os._exit(7)


def test_killed_at_any_moment_it_goes_on_to_the_same_files(tokenizer, corpus, tmp_path, capsys):
    for name in ("below/c.json.zst", "d.parquet", "e.txt"):
        (corpus / name).unlink()
    assert preprocess(tokenizer, tmp_path / "whole", "--input", corpus) == 0
    moments = [
        (PartWriter, "finish", 2, False), (PartWriter, "finish", 3, True), (PartWriter, "add", 9, True),
        (merge, "copy_tokens", 2, True), (merge, "_flush", 1, True), (merge, "written_atomically", 1, False),
        (merge, "_give_name", 1, True), (merge, "remove_parts", 1, False),
    ]  # fmt: skip
    for number, (owner, name, at, after) in enumerate(moments):
        out = tmp_path / f"o{number}"
        run = lambda out=out: preprocess(tokenizer, out, "--input", corpus)
        assert killed_in(owner, name, at, after, run) == signal.SIGKILL, name
        capsys.readouterr()
        assert run() == 0
        assert made(out) == made(tmp_path / "whole"), name
    assert leftovers(tmp_path) == []


def test_it_goes_on_only_from_the_same_input_tokenizer_and_options(tokenizer, corpus, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_buffer", full)
        assert preprocess(tokenizer, out, "--input", corpus) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err.splitlines()[-1]
    parts = len(list(Path(f"{out}_text_document.parts").glob("*.part")))
    assert parts > 10

    def refused(*arguments) -> str:
        assert preprocess(tokenizer, out, *arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "vocab_size: is 400, the finished parts are made with 300" in refused("--input", corpus, "--vocab-size", 400)
    assert "bos: is False" in refused("--input", corpus, "--no-bos")
    assert "--input: gives 1 files" in refused("--input", corpus / "a.jsonl")
    changed = corpus / "b.jsonl.gz"
    content = changed.read_bytes()
    changed.write_bytes(gzip.compress(gzip.decompress(content).replace(b"clips", b"clops")))
    error = refused("--input", corpus)
    assert f"{changed}: has other content" in error and "remove" in error
    changed.write_bytes(content)
    assert preprocess(tokenizer, out, "--input", corpus) == 0
    assert "going on: " in capsys.readouterr().err
    assert f"{out}_text_document.bin: is there already" in refused("--input", corpus)


def test_a_full_disk_is_one_line_and_nothing_half_written(tokenizer, corpus, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", full)
        outcomes = in_ranks(patch, 2, lambda: preprocess(tokenizer, tmp_path / "o", "--input", corpus))
    assert outcomes == [2, 2]
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    folder = tmp_path / "o_text_document.parts"
    assert not [path for path in folder.iterdir() if ".tmp-" in path.name or path.suffix == ".part"]
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: type("Free", (), {"free": 1000})())
    assert preprocess(tokenizer, tmp_path / "o", "--input", corpus) == 2
    assert "0 MB are free; the parts stay" in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_work_is_refused_in_a_line(tokenizer, tmp_path, capsys):
    good = write_lines(tmp_path / "good.jsonl", TEXTS)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "list.json").write_text('[{"text": "a"}]')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.read_bytes() * 50)[:-30])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[list, str]] = [
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["empty.jsonl"], "empty.jsonl: the file is empty"),
        (["list.json"], "list.json: its first line is no object"),
        (["cut.jsonl.gz"], "cut.jsonl.gz: not a whole gzip file"),
        (["bad.parquet"], "bad.parquet: cannot be read"),
        (["other.parquet"], "other.parquet: field 'text' is missing; the file has 'body'"),
        (["nothing"], "nothing: the folder holds no file to read"),
        (["blank.txt"], "blank.txt: no document is left"),
        (["saved"], "saved: was made by datasets' save_to_disk"),
        (["pipe"], "pipe: is a pipe"),
        (["good.jsonl", "good.jsonl"], "good.jsonl: is named twice"),
        (["good.jsonl", "--vocab-size", "20"], "is beyond the vocabulary of 20"),
        (["good.jsonl", "--vocab-size", "2"], "--vocab-size 2: token 2, which stands around documents"),
        (["good.jsonl", "--decontaminate", "x"], "expected NAME=FILE"),
        (["good.jsonl", "--decontaminate", f"x={tmp_path / 'no.jsonl'}"], "no.jsonl: no such file"),
    ]
    for number, (arguments, message) in enumerate(cases):
        paths = [
            str(tmp_path / text) if (tmp_path / text).exists() or "." in text and "=" not in text else text for text in arguments
        ]
        assert preprocess(tokenizer, tmp_path / f"o{number}", "--input", *paths) == 2, arguments
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and "Traceback" not in error, (arguments, error)
        assert not list(tmp_path.glob(f"o{number}_text_document.[bij]*"))
    assert preprocess(tokenizer, tmp_path / "no/where", "--input", good) == 2
    assert preprocess((tmp_path, None), tmp_path / "o", "--input", good) == 2
    assert preprocess(tokenizer, tmp_path, "--input", good) == 2


def test_documents_of_text_files(tokenizer, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\ufeffone\ntwo\n\n \n  three \r\n\nfour", encoding="utf-8")
    own = tokenizer[1]
    wanted = {
        "paragraphs": ["one\ntwo", "three", "four"],
        "lines": ["one", "two", "  three ", "four"],
        "files": ["one\ntwo\n\n \n  three \r\n\nfour"],
    }
    for kind, texts in wanted.items():
        assert preprocess(tokenizer, tmp_path / kind, "--input", source, "--text-documents", kind, "--no-bos") == 0
        tokens = [token for text in texts for token in [*own.encode_plain(text), own.eos_id]]
        assert np.frombuffer(made(tmp_path / kind)[".bin"], np.uint16).tolist() == tokens


def test_a_process_that_dies_or_fails_is_told():
    for task, told in (("die", "a process of preprocessing died"), ("fail", "told by a process")):
        with pytest.raises(DataError, match=told):
            crew.Pool(1).run(PreprocessJob([], "", "", TokenOptions(), 1), fail_or_die, [task, task], lambda *done: None)


def test_two_at_once_cannot_write_the_same_files(tokenizer, corpus, tmp_path, capsys):
    with _lock(tmp_path / "o_text_document.parts"):
        assert preprocess(tokenizer, tmp_path / "o", "--input", corpus) == 2
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
