"""A public model, SmolLM2-135M-Instruct, from import to what plain vLLM answers.

The folder is that of the variable MEGATRON_R1_TEST_SMOLLM2; `python examples/smollm2/get_weights.py --out FOLDER` makes one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.smollm2.make_problems import write_files
from megatron_r1 import cli
from megatron_r1.weights.hf import HfFolder
from tests.paths import ROOT
from tests.pipeline.grpo_runs import finish, read_metrics

VARIABLE = "MEGATRON_R1_TEST_SMOLLM2"
QUESTION = "What is the capital of France?"
ASK = f"""
import json, sys, vllm
engine = vllm.LLM(sys.argv[1], dtype="float32", max_model_len=128, enforce_eager=True)
asked = [[{{"role": "user", "content": "{QUESTION}"}}]]
(output,) = engine.chat(asked, vllm.SamplingParams(temperature=0.0, max_tokens=12))
print(json.dumps([list(output.prompt_token_ids), list(output.outputs[0].token_ids), output.outputs[0].text]))
"""


@pytest.fixture(scope="module")
def weights() -> Path:
    """The model's folder; without it the tests are skipped."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to a folder of SmolLM2-135M-Instruct, as examples/smollm2/get_weights.py makes it")
    return Path(folder)


def test_it_is_imported_tuned_trained_exported_and_served(weights: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_files(data, 0)
    solutions = (data / "solutions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(solutions[:4]))

    def run(command: str, model: Path, *own: str) -> Path:
        settings = ["runtime.threads=1", "checkpoint.interval=100", f"run_dir={tmp_path / command}", f"model.weights={model}"]
        settings += [f"data.source={data / 'train.jsonl'}", f"data.evaluation_source={data / 'heldout.jsonl'}", *own]
        config = str(ROOT / "examples/smollm2/arithmetic.yaml")
        finish([sys.executable, "-m", "megatron_r1.cli", command, "--config", config, *settings], tmp_path / f"{command}.log")
        return tmp_path / command

    assert cli.main(["convert", "import", "--hf", str(weights), "--out", str(tmp_path / "megatron")]) == 0
    assert cli.main(["convert", "verify", "--hf", str(weights), "--megatron", str(tmp_path / "megatron")]) == 0
    few = f"sft.sources=[{{path: {tmp_path / 'few.jsonl'}, format: pair}}]"
    tuned = run("sft", tmp_path / "megatron", few, "sft.epochs=2", "sft.batch_size=4", "sft.optimizer.lr=1.0e-5")
    losses = [line["loss"] for line in read_metrics(tuned) if "loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    trained = run(
        "grpo", tuned, "grpo.rollouts=2", "grpo.prompts_per_rollout=2", "grpo.group_size=4", "grpo.minibatch_size=8",
        "grpo.optimizer.lr=1.0e-6", "evaluate.problems=0", "reward.length_penalty_weight=1.0",
        "reward.length_penalty_max_tokens=24", "reward.length_penalty_cache_tokens=24",  # rewards that differ in every group
    )  # fmt: skip
    steps = [line for line in read_metrics(trained) if line["step"] > 0]
    assert len(steps) == 2 and max(step["grad_norm"] for step in steps) > 0
    assert all(step["logprob_diff/mean"] < 1e-4 for step in steps)

    exported = tmp_path / "exported"
    assert cli.main(["convert", "export", "--megatron", str(trained), "--out", str(exported)]) == 0
    before, stage, after = (HfFolder(folder) for folder in (weights, trained / "hf", exported))
    assert before.files.keys() == stage.files.keys() == after.files.keys()
    assert all(torch.equal(stage.read(name), after.read(name)) for name in stage.files)
    assert 0 < max((after.read(name) - before.read(name)).abs().max() for name in before.files) < 1e-3
    _check_served(exported, weights)


def _check_served(folder: Path, untouched: Path) -> None:
    """Plain vLLM and transformers ask with its template and answer alike, in what is language to the untouched model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    served = subprocess.run([sys.executable, "-c", ASK, str(folder)], check=False, capture_output=True, text=True, env=environment)
    assert served.returncode == 0, served.stderr[-3000:]
    asked, answered, text = json.loads(served.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert asked == ids["input_ids"][0].tolist()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        whole = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert answered == whole[0, len(asked) :].tolist()
        before = AutoModelForCausalLM.from_pretrained(untouched, dtype=torch.float32).eval()
        labels = whole.clone()
        labels[:, : len(asked)] = -100
        assert before(whole, labels=labels).loss < 4.0, text  # nats a token; tokens at random have 15
