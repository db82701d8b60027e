"""The converter as a user starts it: there and back, resumed, and with every kind of bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1 import cli
from megatron_r1.runtime import distributed
from megatron_r1.weights.hf import HfFolder
from tests.paths import ROOT
from tests.random_weights import full_architecture, further_families, llama_architecture, qwen2_architecture, write_random_model

MODELS = {"v3": full_architecture(), "qwen2": qwen2_architecture(), "llama": llama_architecture(), **further_families()}
SMALL_FILES = ("--max-file-size", "0.0004")
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture(autouse=True)
def one_command_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is a process: forget where the ranks of the commands before met."""
    monkeypatch.setattr(distributed, "_STORE", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of random bf16 models, with a tokenizer file and a field of config.json that this project does not know."""
    folder = tmp_path_factory.mktemp("models")
    for name, arch in MODELS.items():
        write_random_model(folder / name, arch, dtype=torch.bfloat16)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"pretraining_tp": 1}))
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def v3(models: Path, tmp_path: Path) -> Path:
    """A deepseek_v3 folder that a test may break."""
    return shutil.copytree(models / "v3", tmp_path / "v3")


@pytest.fixture(scope="module")
def imported(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deepseek_v3 folder, imported into several files."""
    out = tmp_path_factory.mktemp("imported") / "v3"
    convert("import", "--hf", models / "v3", "--out", out, *SMALL_FILES)
    return out


def convert(*arguments: object) -> None:
    """Run the command and expect that it succeeds."""
    assert cli.main(["convert", *map(str, arguments)]) == 0


def complain(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command prints, after checking that it is one and that the exit code is 2."""
    capfd.readouterr()
    code = cli.main(["convert", *map(str, arguments)])
    progress = ("import: ", "export: ", "verify: ")
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(progress)]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("megatron-r1: error: "), lines
    return lines[0]


def same_folders(a: Path, b: Path) -> bool:
    """Whether two Hugging Face folders hold the same tensors, bit for bit."""
    left, right = HfFolder(a), HfFolder(b)
    assert left.files.keys() == right.files.keys()
    return all(left.dtype(n) is right.dtype(n) and torch.equal(left.read(n), right.read(n)) for n in left.files)


def rewrite(folder: Path, name: str, change: object) -> str:
    """Put `change(tensor)` in place of a tensor; the name of its file."""
    file = HfFolder(folder).files[name]
    tensors = load_file(folder / file)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("v3", {}),
        ("v3", {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 1}),
        ("llama", {"tp": 2}),
        *((name, {"tp": 2, "pp": 2}) for name in ("qwen2", *further_families())),
    ],
    ids=str,
)
def test_there_and_back_is_exact(models, tmp_path, capfd, model, layout):
    options = [text for axis, n in layout.items() for text in (f"--{axis}", n)]
    convert("import", "--hf", models / model, "--out", tmp_path / "m", "--verify", *options)
    assert "are equal" in capfd.readouterr().out
    convert("export", "--megatron", tmp_path / "m", "--out", tmp_path / "hf")
    assert same_folders(models / model, tmp_path / "hf")
    original = json.loads((models / model / "config.json").read_text())
    assert json.loads((tmp_path / "hf/config.json").read_text()) == original
    assert (tmp_path / "hf/tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m"]


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Put one more tensor into the first file and the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = min(index["weight_map"].values())
    save_file(load_file(folder / file) | {name: tensor}, folder / file, metadata={"format": "pt"})
    index["weight_map"][name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_layer(folder: Path, part: str) -> None:
    """Take out the tensors of the layer of multi-token prediction whose names have this part."""
    for name in [name for name in HfFolder(folder).files if name.startswith("model.layers.5.") and part in name]:
        drop(folder, name)


#: What published folders have or lack against an exported one.
FORMS = {
    "frequencies of RoPE": ("v3", lambda folder: add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))),
    "multi-token prediction without copies": (
        "v3", lambda folder: (without_layer(folder, "embed_tokens"), without_layer(folder, "shared_head.head"))),
    "no multi-token prediction": ("v3", lambda folder: without_layer(folder, "")),
    "a tied model with an output layer": (
        "qwen2", lambda folder: add(folder, "lm_head.weight", HfFolder(folder).read("model.embed_tokens.weight").clone())),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_published_folders_are_read(models, tmp_path, capfd, form):
    model, change = FORMS[form]
    folder = shutil.copytree(models / model, tmp_path / "published")
    change(folder)
    convert("import", "--hf", folder, "--out", tmp_path / "m", "--tp", 2, "--verify")
    convert("export", "--megatron", tmp_path / "m", "--out", tmp_path / "hf", "--verify")
    theirs, ours = HfFolder(folder), HfFolder(tmp_path / "hf")
    assert theirs.architecture() == ours.architecture()
    whole = HfFolder(models / model).files.keys()
    assert ours.files.keys() == (whole if form != "no multi-token prediction" else theirs.files.keys())
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.files.keys() & theirs.files.keys())
    if model == "v3":
        assert ours.config["num_nextn_predict_layers"] == (0 if form == "no multi-token prediction" else 1)


def test_a_tied_output_layer_that_differs_is_named(models, tmp_path, capfd):
    folder = shutil.copytree(models / "qwen2", tmp_path / "published")
    add(folder, "lm_head.weight", HfFolder(folder).read("model.embed_tokens.weight") + 1)
    line = complain(capfd, "import", "--hf", folder, "--out", tmp_path / "m")
    assert "lm_head.weight" in line and "differs from model.embed_tokens.weight" in line


def test_a_part_of_multi_token_prediction_is_not_enough(v3, tmp_path, capfd):
    without_layer(v3, "self_attn")
    assert "lacks tensors: model.layers.5.self_attn" in complain(capfd, "import", "--hf", v3, "--out", tmp_path / "m")


def test_what_transformers_saves_of_a_v3_is_read(models, tmp_path):
    """Without multi-token prediction, its config.json spelled in transformers' own way."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(models / "v3", dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    convert("import", "--hf", tmp_path / "saved", "--out", tmp_path / "m", "--verify")
    convert("export", "--megatron", tmp_path / "m", "--out", tmp_path / "hf", "--verify")
    ours, first = HfFolder(tmp_path / "hf"), HfFolder(models / "v3")
    assert ours.architecture() == first.architecture().model_copy(update={"num_nextn_predict_layers": 0})
    assert all(torch.equal(ours.read(name), first.read(name)) for name in ours.files)


@pytest.mark.parametrize(
    ("name", "word"), [("torch.bfloat16", "BF16"), ("bfloat16", "BF16"), ("torch.float32", "F32"), ("float16", "F16")]
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dry_run_takes_dtypes_as_they_are_written(models, tmp_path, capfd, key, name, word):
    config = json.loads((models / "qwen2/config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | {key: name}))
    convert("dry-run", "--config", tmp_path / "config.json")
    assert f"  {word}  " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "word"),
    [({"torch_dtype": "auto"}, "'auto'"), ({"torch_dtype": 7}, "is 7"), ({"quantization_config": {"quant_method": "awq"}}, "FP8"),
     ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"head_dim": -2}, "head_dim")],
    ids=str,
)  # fmt: skip
def test_dry_run_of_a_config_that_is_none_is_one_line(models, tmp_path, capfd, change, word):
    config = json.loads((models / "qwen2/config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = complain(capfd, "dry-run", "--config", tmp_path / "config.json")
    assert word in line and str(tmp_path) in line


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"model_type": ' + "9" * 5000 + "}", "\x00", "[1]"], ids=["deep", "long", "zero", "list"]
)
def test_a_config_that_is_no_mapping_is_one_line(models, tmp_path, capfd, text):
    folder = shutil.copytree(models / "qwen2", tmp_path / "published")
    (folder / "config.json").write_text(text)
    assert "config.json" in complain(capfd, "import", "--hf", folder, "--out", tmp_path / "m")
    assert "config.json" in complain(capfd, "dry-run", "--config", folder / "config.json")


def test_fp8_out_and_back(imported, tmp_path, capfd):
    convert("export", "--megatron", imported, "--out", tmp_path / "hf", "--dtype", "fp8", "--verify")
    assert "after quantising" in capfd.readouterr().out
    folder = HfFolder(tmp_path / "hf")
    assert folder.config["quantization_config"]["weight_block_size"] == [128, 128] and folder.config["torch_dtype"] == "bfloat16"
    assert folder.dtype(EXPERT) is torch.float8_e4m3fn and folder.dtype("model.embed_tokens.weight") is torch.bfloat16
    assert folder.dtype("model.layers.2.mlp.gate.e_score_correction_bias") is torch.float32
    convert("import", "--hf", tmp_path / "hf", "--out", tmp_path / "m", "--verify")
    assert "after dequantising" in capfd.readouterr().out
    convert("export", "--megatron", tmp_path / "m", "--out", tmp_path / "bf16", "--dtype", "bf16")
    assert "quantization_config" not in HfFolder(tmp_path / "bf16").config


def test_fp8_is_deepseeks_only(models, tmp_path, capfd):
    convert("import", "--hf", models / "qwen2", "--out", tmp_path / "m")
    assert "deepseek_v3's" in complain(capfd, "export", "--megatron", tmp_path / "m", "--out", tmp_path / "hf", "--dtype", "fp8")


def test_a_difference_is_named(v3, imported, capfd):
    file = rewrite(
        v3, EXPERT, lambda tensor: tensor.index_put((torch.tensor([5]), torch.tensor([7])), torch.tensor(9.0).bfloat16())
    )
    line = complain(capfd, "verify", "--hf", v3, "--megatron", imported)
    assert f"1 of {len(HfFolder(v3).files)} tensors differ" in line and EXPERT in line and file in line


def test_an_interrupted_import_goes_on(models, imported, tmp_path, monkeypatch):
    arguments = ("import", "--hf", models / "v3", "--out", tmp_path / "m", *SMALL_FILES)
    reads = []

    def read(self: HfFolder, name: str, *args: object, **kwargs: object) -> torch.Tensor:
        reads.append(name)
        if len(reads) == 100:
            raise KeyboardInterrupt
        return HfFolder.__dict__["original_read"](self, name, *args, **kwargs)

    monkeypatch.setattr(HfFolder, "original_read", HfFolder.read, raising=False)
    monkeypatch.setattr(HfFolder, "read", read)
    assert cli.main(["convert", *map(str, arguments)]) == 130
    assert not (tmp_path / "m").exists()
    first = len(reads)
    convert(*arguments)
    assert len(reads) - first < len(HfFolder(models / "v3").files)  # what was done is not read again
    for path in imported.glob("policy/*.distcp"):
        assert (tmp_path / "m/policy" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "m/COMPLETE").is_file() and sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_another_conversion_does_not_go_on(v3, models, tmp_path, capfd):
    rewrite(v3, EXPERT, lambda tensor: tensor * torch.nan)
    complain(capfd, "import", "--hf", v3, "--out", tmp_path / "m")
    line = complain(capfd, "import", "--hf", models / "v3", "--out", tmp_path / "m")
    assert "remainder of another conversion" in line and "from" in line


def test_an_existing_folder_is_refused(models, imported, capfd):
    assert f"{imported} is there already" in complain(capfd, "import", "--hf", models / "v3", "--out", imported)
    assert f"{models / 'v3'} is there already" in complain(capfd, "export", "--megatron", imported, "--out", models / "v3")


BAD = {
    "shard missing": (lambda folder: (folder / "model-00001-of-00001.safetensors").unlink(), ["model-00001-of-00001.safetensors"]),
    "wrong shape": (lambda folder: rewrite(folder, EXPERT, lambda t: t[:-1].contiguous()), [EXPERT, "[31, 64]", "safetensors"]),
    "nan": (lambda folder: rewrite(folder, EXPERT, lambda t: t * torch.nan), [EXPERT, "NaN", "safetensors"]),
    "unknown architecture": (lambda folder: lie(folder, model_type="gpt9"), ["config.json", "gpt9"]),
    "a config that lies about experts": (lambda folder: lie(folder, n_routed_experts=4, n_group=2), ["unknown tensors"]),
    "a config that lies about width": (lambda folder: lie(folder, moe_intermediate_size=16), ["experts.gate_proj", "[32, 64]",
    "[16, 64]"]),
    "a pickle": (lambda folder: pickle_weights(folder), ["model-00001-of-00001.safetensors", "pickle"]),
    "a copy that differs": (
        lambda folder: rewrite(folder, "model.layers.5.embed_tokens.weight", lambda t: t + 1),
        ["model.layers.5.embed_tokens.weight", "model.embed_tokens.weight"],
    ),
    "a tensor missing": (lambda folder: drop(folder, EXPERT), [EXPERT]),
}  # fmt: skip


def lie(folder: Path, **changes: object) -> None:
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder: Path, name: str) -> None:
    """Take a tensor out of its file and of the index."""
    file = HfFolder(folder).files[name]
    tensors = load_file(folder / file)
    del tensors[name]
    save_file(tensors, folder / file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_weights(folder: Path) -> None:
    """A pickle under the name of a safetensors file."""
    torch.save({"weight": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(v3, tmp_path, capfd, case):
    spoil, words = BAD[case]
    spoil(v3)
    line = complain(capfd, "import", "--hf", v3, "--out", tmp_path / "m")
    assert all(word in line for word in words), line
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "COMPLETE").unlink(), ["not complete", "COMPLETE"]),
        (lambda folder: (folder / "policy/__1_0.distcp").unlink(), ["__1_0.distcp", "missing"]),
        (lambda folder: flip(folder / "policy/__1_0.distcp"), ["__1_0.distcp", "checksum"]),
        (lambda folder: lie(folder, n_routed_experts=4, n_group=2), ["experts", "expected"]),
        (lambda folder: shutil.rmtree(folder / "policy"), ["no Megatron checkpoint"]),
    ],
    ids=["interrupted", "file missing", "bit flipped", "config lies", "no weights"],
)
def test_a_bad_checkpoint_is_one_line_that_names_it(imported, tmp_path, capfd, spoil, words):
    folder = shutil.copytree(imported, tmp_path / "m")
    spoil(folder)
    line = complain(capfd, "export", "--megatron", folder, "--out", tmp_path / "hf")
    assert all(word in line for word in words), line
    assert not (tmp_path / "hf").exists()


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DISK = """
import shutil, subprocess, sys
from types import SimpleNamespace
from pathlib import Path
from megatron_r1.cli import main
hf, disk = sys.argv[1:]
arguments = ["convert", "import", "--hf", hf, "--out", disk + "/m", "--max-file-size", "0.0004"]
assert main(arguments) == 2  # the disk is known to be too small
real = shutil.disk_usage
shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 60)  # as where others fill the disk meanwhile
assert main(arguments) == 2
assert not Path(disk, "m").exists()
done = {path: path.stat().st_mtime_ns for path in Path(disk, ".tmp-m/policy").glob("*.distcp")}
assert done, "no part was finished before the disk was full"
subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
shutil.disk_usage = real
assert main(arguments) == 0
assert Path(disk, "m/COMPLETE").is_file()
assert all(Path(disk, "m/policy", path.name).stat().st_mtime_ns == time for path, time in done.items())
"""


def test_a_disk_that_fills_up(models, tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*namespace, "mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a small file system")
    script = f'mount -t tmpfs -o size=700k tmpfs "{tmp_path}" && exec "$0" -c "$1" "$2" "{tmp_path}"'
    command = [*namespace, "sh", "-c", script, sys.executable, DISK, str(models / "v3")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("megatron-r1")]
    assert len(lines) == 2 and "GB free" in lines[0] and "No space left on device" in lines[1] and "Traceback" not in result.stderr
