"""What is fuzzed: for every kind of input, how one bad input is drawn and which command reads it.

Each command would end soon even with good input: those that train are given a model with a NaN, which they find after they
have read settings, data, tokenizer and config.json. So an exit code of 0 from one of them is a finding, too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz import world as good
from tests.fuzz.mutate import ODD_VALUES, mutate_bytes, mutate_tree, write_json
from tests.fuzz.world import World


@dataclass(frozen=True)
class Case:
    """One command line with its files and environment."""

    arguments: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[Path, ...] = ()  #: must not be there after an error
    codes: tuple[int, ...] = (2,)  #: exit codes that are right


Draw = Callable[[World, random.Random, Path], Case]
TARGETS: dict[str, tuple[Draw, int]] = {}  #: name -> how to draw a case, and its share of all cases


def target(share: int) -> Callable[[Draw], Draw]:
    """Register a function that writes the files of one case into a folder of its own and returns the case."""

    def add(draw: Draw) -> Draw:
        TARGETS[draw.__name__.replace("_", "-")] = draw, share
        return draw

    return add


def _train(world: World, folder: Path, command: str, *overrides: str, config: Path | None = None) -> list[str]:
    run_dir = [] if config else [f"run_dir={folder / 'run'}"]
    return [*command.split(), "--config", str(config or world.folder / "config.yaml"), *run_dir, *overrides]


def _changed(rng: random.Random, tree: Any, data: bytes) -> bytes:
    """A change of the tree that the bytes stand for (as JSON), or of the bytes themselves."""
    return write_json(mutate_tree(rng, tree)) if rng.random() < 0.6 else mutate_bytes(rng, data)


def _records(rng: random.Random, records: list[Any]) -> tuple[str, bytes]:
    """(suffix, content) of a file of records: changed records in a good file, or a changed file."""
    changed = mutate_tree(rng, records)
    changed = changed if isinstance(changed, list) else [changed]
    kind = rng.choice((".jsonl", ".jsonl", ".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet"))
    if rng.random() < 0.3:
        changed = records
    if kind == ".json":
        data = json.dumps(changed, default=str).encode()
    elif kind == ".csv":
        data = good.csv([record for record in changed if isinstance(record, dict)])
    elif kind == ".parquet":
        data = good.parquet(records[:1])
    else:
        data = good.json_lines(changed)
        data = good.gzipped(data) if kind.endswith(".gz") else good.zipped_zstd(data) if kind.endswith(".zst") else data
    if changed is records or kind == ".parquet" or rng.random() < 0.2:
        data = mutate_bytes(rng, data)
    return kind, data


def _write(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


STAGES = ("grpo", "sft data.template=r1_chat", "pretrain", "evaluate", "pipeline r1-zero", "reward-model data.template=r1_chat")


@target(18)
def settings(world: World, rng: random.Random, folder: Path) -> Case:
    """A config file: a hostile value, a misspelt key, YAML that is none."""
    config = world.config | {"run_dir": str(folder / "run")}
    if rng.random() < 0.6:
        data = _as_yaml(mutate_tree(rng, config))
    else:
        data = mutate_bytes(rng, yaml.safe_dump(config).encode())
    command, *overrides = rng.choice(STAGES[:2]).split(" ", 1)
    # whatever the file says, the model has a NaN and the run folder is the case's own
    fixed = [f"run_dir={folder / 'run'}", f"model.weights={world.spoilt}", "runtime.device=cpu"]
    return Case([command, "--config", str(_write(folder, "config.yaml", data)), *overrides, *fixed])


@target(14)
def overrides(world: World, rng: random.Random, folder: Path) -> Case:
    """Settings on the command line."""
    from megatron_r1.config.schema import Config

    keys = list(_leaves(Config().model_dump()))
    stage = rng.choice(STAGES)
    chosen = [f"{rng.choice(keys)}={_as_text(rng)}" for _ in range(rng.randint(1, 2))]
    fixed = [f"run_dir={folder / 'run'}", f"model.weights={world.spoilt}", "runtime.device=cpu"]
    return Case([*_train(world, folder, stage.split(" data.")[0]), *stage.split()[2:], *chosen, *fixed])


@target(4)
def arguments(world: World, rng: random.Random, folder: Path) -> Case:
    """Command lines that are none."""
    from megatron_r1.cli.commands import COMMANDS

    words = [*COMMANDS, "evaluate", "score", "-x", "check-problems", "convert", "pipeline", "status", "report", "config",
             "--config", "--input", "--output", "--reward", "math", "--workers", "--table", "=", "a=b", "seed=1",
             "--from", "import", "--hf", "--megatron", "verify", "dry-run", "--tp",
             str(folder), str(world.folder / "config.yaml")]  # fmt: skip
    line = [rng.choice(words) if rng.random() < 0.8 else _as_text(rng) for _ in range(rng.randint(1, 6))]
    if line[0] in ("serve-rollouts", "preflight", "doctor"):
        line[0] = "status"
    trains = line[0] in (*COMMANDS, "evaluate")  # with nothing but defaults, too: `pretrain` alone begins a run
    return Case([*line, f"model.weights={world.spoilt}"] if trains else line, codes=(0, 1, 2))


@target(6)
def environment(world: World, rng: random.Random, folder: Path) -> Case:
    """Variables that torchrun, Slurm, MPI or a shell left behind, consistent or not."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS",
             "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODELIST", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_RANK",
             "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "OMP_NUM_THREADS", "TMPDIR", "HOME")  # fmt: skip
    odd = ("", "0", "1", "-1", "x", "1.5", "9" * 30, " 0", "0x1", "nowhere.invalid", "٣", "\u200b", "/nowhere")
    chosen = {name: rng.choice(odd) for name in rng.sample(names, rng.randint(1, 3))}
    if chosen.get("WORLD_SIZE", "1") not in ("1", "") and chosen.get("RANK") in ("0", "1"):
        chosen["WORLD_SIZE"] = "x"  # a whole launch would wait for its other ranks: that is right, and takes its time
    return Case(_train(world, folder, "grpo"), chosen, codes=(2,))


@target(14)
def problems(world: World, rng: random.Random, folder: Path) -> Case:
    """A file of problems for GRPO."""
    suffix, data = _records(rng, rng.choice((good.PROBLEMS, good.CODE_PROBLEMS)))
    source = _write(folder, f"data{suffix}", data)
    return Case(_train(world, folder, "grpo", f"data.source={source}"))


@target(12)
def conversations(world: World, rng: random.Random, folder: Path) -> Case:
    """A file of conversations for SFT."""
    suffix, data = _records(rng, rng.choice([[record] for record in good.CONVERSATIONS] + [good.CONVERSATIONS]))
    source = json.dumps([str(_write(folder, f"data{suffix}", data))])
    return Case(_train(world, folder, "sft", f"sft.sources={source}", "data.template=r1_chat"))


@target(6)
def preferences(world: World, rng: random.Random, folder: Path) -> Case:
    """A file of pairs for a reward model."""
    suffix, data = _records(rng, rng.choice(([good.PAIRS[0]] * 3, [good.PAIRS[1]] * 3)))
    source = _write(folder, f"data{suffix}", data)
    return Case(_train(world, folder, "reward-model", f"data.source={source}", "data.template=r1_chat"))


@target(6)
def curation(world: World, rng: random.Random, folder: Path) -> Case:
    """A file of conversations for curation."""
    suffix, data = _records(rng, [good.CONVERSATIONS[0], good.CONVERSATIONS[0]])
    inputs = json.dumps([str(_write(folder, f"data{suffix}", data))])
    return Case(["curate", f"curation.inputs={inputs}", f"run_dir={folder / 'run'}"], codes=(0, 2))


@target(10)
def model_folder(world: World, rng: random.Random, folder: Path) -> Case:
    """A published model's small files: config.json, tokenizer and generation settings."""
    model = folder / "model"
    model.mkdir()
    files = {file.name: file.read_bytes() for file in world.spoilt.iterdir()}
    name = rng.choice(sorted(files) + ["config.json"] * 3)
    is_json = name.endswith(".json")
    files[name] = _changed(rng, json.loads(files[name]), files[name]) if is_json else mutate_bytes(rng, files[name])
    if rng.random() < 0.1:
        files["chat_template.jinja"] = rng.choice(
            (b"{% for i in range(10**9) %}{% endfor %}", b"{{ x", b"{{ ''.__class__ }}", b"\xff")
        )
    for file, data in files.items():
        _write(model, file, data)
    stage = rng.choice(("grpo", "sft"))
    template = rng.choice((["data.template=tokenizer"], [])) if stage == "sft" else []
    data = [f"sft.sources={json.dumps([str(world.folder / 'conversations.jsonl')])}"] if stage == "sft" else []
    return Case(_train(world, folder, stage, f"model.weights={model}", *(template or ["data.template=r1_chat"]), *data))


@target(8)
def weights(world: World, rng: random.Random, folder: Path) -> Case:
    """A folder of weights that is converted: headers, index, shapes, lengths."""
    source = world.models[rng.choice(sorted(world.models))]
    model = folder / "model"
    model.mkdir()
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    name = rng.choice(sorted(files) + sorted(file for file in files if file.endswith(".safetensors")) * 3)
    data = files[name]
    if name.endswith(".safetensors") and rng.random() < 0.7:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        kept = {key: header.pop(key) for key in sorted(header)[3:]}  # few places, so that they are reached
        text = json.dumps(mutate_tree(rng, header) if rng.random() < 0.8 else header, default=str)
        text = text if not kept or not text.startswith("{") else json.dumps(kept)[:-1] + ", " + text[1:]
        data = rng.choice((len(text), len(text), 2**62, 0)).to_bytes(8, "little") + text.encode() + data[8 + size :]
    elif name.endswith(".safetensors"):
        data = mutate_bytes(rng, data)
    else:
        data = _changed(rng, json.loads(data), data) if name.endswith(".json") else mutate_bytes(rng, data)
    for file, content in (files | {name: data}).items():
        _write(model, file, content)
    out = folder / "out"
    return Case(["convert", "import", "--hf", str(model), "--out", str(out)], outputs=(out,), codes=(0, 2))


@target(4)
def config_json(world: World, rng: random.Random, folder: Path) -> Case:
    """A config.json alone, of which every rank is planned."""
    tree = json.loads((world.models[rng.choice(sorted(world.models))] / "config.json").read_text())
    file = _write(folder, "config.json", _changed(rng, tree, json.dumps(tree).encode()))
    return Case(["convert", "dry-run", "--config", str(file), "--tp", rng.choice(("1", "2", "3"))], codes=(0, 2))


@target(4)
def run_folder(world: World, rng: random.Random, folder: Path) -> Case:
    """What a run left, read by status and report."""
    run = folder / "run"
    run.mkdir()
    _write(run, "config.yaml", (world.folder / "config.yaml").read_bytes())
    made = b'{"command": "grpo", "started": "2026-01-01T00:00:00+00:00"}'
    _write(run, "run.json", made if rng.random() < 0.8 else mutate_bytes(rng, made))
    metrics = mutate_tree(rng, good.METRICS)
    data = good.json_lines(metrics if isinstance(metrics, list) else [metrics])
    _write(run, "metrics.jsonl", data if rng.random() < 0.6 else mutate_bytes(rng, data))
    if rng.random() < 0.3:
        _write(run, "config.yaml", mutate_bytes(rng, (world.folder / "config.yaml").read_bytes()))
    return Case([rng.choice(("status", "report")), str(run)], codes=(0, 2))


def _leaves(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [prefix]
    return [key for name, value in tree.items() for key in _leaves(value, f"{prefix}.{name}" if prefix else name)]


def _as_text(rng: random.Random) -> str:
    """An odd value as a shell would hand it over: without NUL, which no argument can hold."""
    value = rng.choice(ODD_VALUES)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("\x00", "")


def _as_yaml(tree: Any) -> bytes:
    """YAML's own style where it can be written, else JSON, which YAML reads as well."""
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (RecursionError, yaml.YAMLError, TypeError):
        return write_json(tree)
