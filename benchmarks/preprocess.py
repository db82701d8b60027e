"""Tokenising text for pretraining: speed against the bare tokenizer, the same files from processes and from mpirun, and memory.

1. `encode_lot`, which reads, parses, encodes and writes, against `encode_batch` of the same tokenizer on texts in memory, in one
   process and in several. Both start their processes and load the tokenizer; the bar is 0.8 by the wall clock.
2. The command as a user starts it, in one process, in two, and in two ranks of mpirun: .bin, .idx and the note must be the same
   bytes. Megatron's own IndexedDataset opens them, and random documents must be what the tokenizer gives.
3. The command on an input of --gigabytes. Its words are looked up in a table, since memory is the question here and merging pairs
   would take most of an hour.

In 2 and 3 the memory of all processes of a command together (PSS), measured four times a second, must stay below 500 MB.

The input is made from the text files that are given, by repetition in random order.

    python -m benchmarks.preprocess --text english.md chinese.md --dir /scratch --out preprocess.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from benchmarks.measure import Disagreement, compare, describe_machine, parser_of, positive, print_table, run, write_results
from benchmarks.processes import ROOT, CommandFailed, with_descendants
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.preprocess.crew import Alone, Crew, Pool
from megatron_r1.preprocess.encode import encode_lot
from megatron_r1.preprocess.job import PreprocessJob, TokenOptions
from megatron_r1.preprocess.lots import deal_lots
from megatron_r1.preprocess.sources import find_sources
from megatron_r1.runtime.launch import child_environment, set_environment

LEAST_RATIO, MOST_MEMORY = 0.8, 500 * 10**6
_BATCH = 1000  # texts that the bare tokenizer gets at once
_PART_BYTES = 1 << 20
_CHECKED = 200  # documents


def make_input(paths: Sequence[Path], size: int, out: Path, seed: int) -> list[str]:
    """Write JSON lines of one to five paragraphs each until they have `size` bytes. Returns their texts, if they fit in 1 GB."""
    paragraphs = [part for path in paths for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    generator, texts, done = random.Random(seed), [], 0
    with out.open("wb") as file:
        while done < size:
            count = generator.randrange(1, 6)
            start = generator.randrange(len(paragraphs) - count)
            text = "\n\n".join(paragraphs[start : start + count])
            done += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            if size < 1 << 30:
                texts.append(text)
    return texts


def words_tokenizer(paths: Sequence[Path], folder: Path) -> None:
    """A tokenizer of 60,000 whole words, fast and of no other use."""
    words = sorted({word for path in paths for word in path.read_text(encoding="utf-8").split()})[:60_000]
    state = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<unk>", "<eos>", *words])}, "<unk>"))
    state.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    Tokenizer(state.to_str(), None, "<eos>", None).save(folder)


def ours(crew: Crew, job: PreprocessJob, texts: int) -> int:
    """Write all parts anew."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir()
    crew.run(job, encode_lot, deal_lots(job.sources, job.part_bytes, crew.size, lambda source, part: None), lambda *done: None)
    return texts


def encode_bare(folder: str, texts_file: str) -> int:
    """What a process of the peer does."""
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    texts = pickle.loads(Path(texts_file).read_bytes())
    return sum(len(e.ids) for at in range(0, len(texts), _BATCH) for e in tokenizer.encode_batch(texts[at : at + _BATCH]))


def bare(folder: str, files: Sequence[str], texts: int) -> int:
    """The peer: each process encodes one of the files."""
    if len(files) == 1:
        encode_bare(folder, files[0])
    else:
        with multiprocessing.get_context("spawn").Pool(len(files)) as pool:
            pool.map(partial(encode_bare, folder), files)
    return texts


def with_cpu(work: Callable[[], int], seconds: list[float]) -> int:
    """Do it and add its CPU seconds, those of the processes that it started and ended included."""
    before = sum(os.times()[:4])
    amount = work()
    seconds.append(sum(os.times()[:4]) - before)
    return amount


def commands(source: Path, tokenizer: Path, out: Path, processes: int) -> Iterator[tuple[str, Path, list[str]]]:
    """The three ways to start it: name, prefix, command."""
    script = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--tokenizer", str(tokenizer), "--append-eod"]
    ranks = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(processes)]
    for name, start, rest in (("one", [], []), ("workers", [], ["--workers", str(processes)]), ("mpirun", ranks, [])):
        yield name, out / name, [*start, *script, "--output-prefix", str(out / name), *rest]


def watch(command: Sequence[str]) -> tuple[float, int]:
    """Run a command to its end. Returns its seconds and the largest memory of all its processes together, in bytes."""
    environment = child_environment({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryFile() as output:
        start, peak = time.perf_counter(), 0
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                peak = max(peak, sum(map(_proportional_bytes, with_descendants(process.pid))))
                time.sleep(0.25)
        if process.returncode:
            output.seek(0)
            raise CommandFailed(f"{' '.join(command[:6])} ...: {output.read().decode().strip().splitlines()[-1:]}")
    return time.perf_counter() - start, peak


def _proportional_bytes(pid: int) -> int:
    """PSS: pages that several processes share count once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def check_files(prefix: Path, tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> None:
    """Open them as Megatron does. Raises Disagreement."""
    from megatron_r1.mcore import host

    host.activate("cpu")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    if len(dataset) != len(texts):
        raise Disagreement(f"{prefix}: {len(dataset)} documents, not {len(texts)}")
    for number in random.Random(seed).sample(range(len(texts)), min(_CHECKED, len(texts))):
        if dataset[number].tolist() != [*tokenizer.start_ids, *tokenizer.encode_plain(texts[number]), tokenizer.eos_id]:
            raise Disagreement(f"{prefix}: document {number} has other tokens than its text")


def compare_encoding(folder: Path, texts: Sequence[str], arguments: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """Part 1. Returns ratio and times by the number of processes."""
    options = TokenOptions(append_eod=True, vocab_size=tokenizer.vocab_size)
    sources = find_sources([folder / "a.jsonl"])[0]
    job = PreprocessJob(sources, str(arguments.tokenizer), str(folder / "ours"), options, _PART_BYTES)
    rows, results = [], {}
    for processes in (1, arguments.processes):
        files = [str(folder / f"{processes}-{number}.texts") for number in range(processes)]
        for number, file in enumerate(files):
            Path(file).write_bytes(pickle.dumps(texts[number::processes]))
        crew = Alone() if processes == 1 else Pool(processes)
        cpu: tuple[list[float], list[float]] = [], []
        own = partial(ours, crew, job, len(texts)), cpu[0]
        peer = partial(bare, str(arguments.tokenizer), files, len(texts)), cpu[1]
        found = compare(f"{processes} processes", partial(with_cpu, *own), partial(with_cpu, *peer), arguments.repeats)
        speeds = [f"{side.per_second:.0f}" for side in (found.ours, found.peer)]
        cpu_ratio = median(theirs / mine for mine, theirs in list(zip(*cpu, strict=True))[1:])  # the first run is not timed
        rows.append([found.workload, *speeds, f"{found.speed_ratio:.2f}", f"{cpu_ratio:.2f}"])
        results[found.workload] = {"ratio": found.speed_ratio, "cpu_ratio": cpu_ratio, "cpu_seconds": cpu, **asdict(found)}
    print_table(["encoding", "ours, documents/s", "encode_batch", "ours / encode_batch", "the same by CPU time"], rows)
    return results


def compare_starts(folder: Path, texts: Sequence[str], arguments: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """Part 2. Raises Disagreement if one of them makes other files, or Megatron reads something else in them."""
    rows, results, first = [], {}, None
    for name, prefix, command in commands(folder / "a.jsonl", arguments.tokenizer, folder, arguments.processes):
        seconds, peak = watch(command)
        files = [Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]
        first = first or files
        if files != first:
            raise Disagreement(f"{name} makes other files than one process")
        rows.append([name, f"{seconds:.1f}", f"{peak / 1e6:.0f}", "yes"])
        results[name] = {"seconds": seconds, "peak_bytes": peak}
    print_table(["command", "seconds", "peak memory, MB", "same bytes"], rows)
    check_files(folder / "one_text_document", tokenizer, texts, arguments.seed)
    return results


def measure_memory(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Part 3."""
    make_input(arguments.text, int(arguments.gigabytes * 1e9), folder / "large.jsonl", arguments.seed)
    words_tokenizer(arguments.text, folder / "words")
    (folder / "large").mkdir()
    _, _, command = next(commands(folder / "large.jsonl", folder / "words", folder / "large", 1))
    seconds, peak = watch(command)
    print_table(["input, GB", "seconds", "peak memory, MB"], [[str(arguments.gigabytes), f"{seconds:.0f}", f"{peak / 1e6:.0f}"]])
    return {"gigabytes": arguments.gigabytes, "seconds": seconds, "peak_bytes": peak}


def benchmark(arguments: argparse.Namespace) -> None:
    """All three parts, in a folder that is removed at the end."""
    machine = describe_machine("cpu")
    set_environment({"TOKENIZERS_PARALLELISM": "false"})
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        if arguments.megabytes:
            texts = make_input(arguments.text, int(arguments.megabytes * 1e6), folder / "a.jsonl", arguments.seed)
            if arguments.tokenizer is None:
                arguments.tokenizer = folder / "tokenizer"
                train_tokenizer(texts[:5000], 16_000).save(arguments.tokenizer)
            tokenizer = Tokenizer.load(arguments.tokenizer)
            results["encoding"] = compare_encoding(folder, texts, arguments, tokenizer)
            results["commands"] = compare_starts(folder, texts, arguments, tokenizer)
        if arguments.gigabytes:
            results["memory"] = measure_memory(folder, arguments)
    if arguments.out is not None:
        arguments.text = [path.name for path in arguments.text]  # written with the other options
        write_results(arguments.out, arguments, results, machine)
    ratios = [found["ratio"] for found in results.get("encoding", {}).values()]
    if ratios and min(ratios) < LEAST_RATIO:
        raise Disagreement(f"ours / encode_batch is {min(ratios):.2f}, the bar is {LEAST_RATIO}")
    peaks = [found["peak_bytes"] for found in (*results.get("commands", {}).values(), results.get("memory")) if found]
    if peaks and max(peaks) >= MOST_MEMORY:
        raise Disagreement(f"{max(peaks) / 1e6:.0f} MB of memory, the bar is {MOST_MEMORY / 1e6:.0f}")


def main() -> int:
    """Returns the exit code."""
    parser = parser_of(__doc__ or "", 3, devices=False)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="texts whose paragraphs are repeated")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: one of 16,000 tokens, trained on the text")
    parser.add_argument("--dir", type=Path, help="where the files are made; default: that of temporary files")
    parser.add_argument("--megabytes", type=float, default=32, help="of the input of parts 1 and 2; 0: without them")
    parser.add_argument("--gigabytes", type=float, default=2, help="of the input of part 3; 0: without it")
    parser.add_argument("--processes", type=positive, default=2, help="besides one")
    return run(benchmark, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
