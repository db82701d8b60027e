"""The commands that talk to a trained model: chat, generate and serve. Imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1.pipeline.talk.model import TalkModel
    from megatron_r1.types import Sampling

_MODEL = """
MODEL is a run folder (its newest checkpoint, or --step N; without checkpoints its exported model), a checkpoint, or a Hugging Face
folder. The run's settings say how it is asked: template, system message, number format, temperature. Other settings of the sections
data, runtime and rollout replace them, e.g. runtime.dtype=bf16 rollout.tensor_parallel_size=8 data.template=tokenizer.
"""
_CHAT = """examples:
  megatron-r1 chat runs/sft
  megatron-r1 chat runs/r1_zero --step 200 --temperature 0
  echo "What is 17 + 25?" | megatron-r1 chat ~/models/SmolLM2-135M-Instruct

Every line of a pipe is a question, or a command as one would type it."""
_GENERATE = """examples:
  megatron-r1 generate runs/sft --input prompts.jsonl --output responses.jsonl --samples 4
  megatron-r1 generate runs/sft --input prompts.txt --output - | jq -r .response

The input is what data.source takes, records with a question, prompt, problem or messages (.jsonl, .json, .csv, .parquet), or
a .txt file, a prompt a line; .gz and .zst too. `-` is standard input: objects if its first line is one, else a prompt a line. The
output has a line a response: the record, and prompt, response, finish (stop or length), tokens, sample and seed, with --logprobs
also token_ids and logprobs. Killed, the same command goes on from what lies in OUTPUT.part, and gives the same file."""


_SERVE = """examples:
  megatron-r1 serve runs/sft --port 8000
  megatron-r1 serve runs/r1 --host 0.0.0.0 --api-key-file key.txt --name r1
  megatron-r1 evaluate --config examples/evaluate/endpoint.yaml evaluate.benchmarks.endpoint.model=sft

A checkpoint in Megatron's format is exported first, into the run's folder `served`. Ctrl-C or SIGTERM ends the server and all its
processes."""


def add_talk(commands: argparse._SubParsersAction) -> None:
    """Add the commands chat, generate and serve."""
    chat = _add(commands, "chat", "talk to a trained model", _CHAT)
    _add_sampling(chat)
    chat.set_defaults(handler=_handle_chat)

    generate = _add(commands, "generate", "responses to the prompts of a file", _GENERATE)
    generate.add_argument("--input", required=True, metavar="FILE", help="prompts; - is standard input")
    generate.add_argument("--output", required=True, metavar="FILE", help="JSON lines, whole or not there; - is standard output")
    generate.add_argument("--samples", type=_count_from_one, default=1, metavar="N", help="responses to a prompt (default: 1)")
    generate.add_argument("--logprobs", action="store_true", help="also the tokens and their log-probabilities")
    generate.add_argument(
        "--batch",
        type=_count_from_one,
        default=256,
        metavar="N",
        help="about how many responses are asked for at a time (default: 256)",
    )
    _add_sampling(generate)
    generate.set_defaults(handler=_handle_generate)
    _add_serve(commands)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = _add(commands, "serve", "serve a trained model behind vLLM's OpenAI-compatible endpoint", _SERVE)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=_port, default=8000, help="default: 8000")
    serve.add_argument("--name", help="of the model in requests; default: that of MODEL's folder")
    serve.add_argument(
        "--api-key-file", metavar="FILE", help="file with the key that requests must have; default: none is asked for"
    )
    serve.set_defaults(handler=_handle_serve)


def _add(commands: argparse._SubParsersAction, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n{_MODEL}",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the run")
    parser.add_argument("--step", type=_count_from_one, metavar="N", help="of the run's checkpoint; default: the newest")
    parser.add_argument(
        "--context", type=_count_from_one, metavar="N",
        help="most tokens of prompt and response together; default: the model's, at most 8192 on CPU and 32768 on a GPU",
    )  # fmt: skip
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=_temperature, metavar="T", help="0: the likeliest token; default: the run's")
    parser.add_argument("--top-p", type=_probability, metavar="P", help="default: the run's")
    parser.add_argument(
        "--max-tokens", type=_count_from_one, metavar="N", help="of a response; default: the run's, at most half of the context"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="the same seed gives the same responses (default: 0)")


def _handle_chat(arguments: argparse.Namespace) -> int:
    from megatron_r1.pipeline.talk.chat import chat

    model = _find_talk_model(arguments, 1)
    try:
        chat(model, _sampling(arguments, model, 1), arguments.seed)
    except BrokenPipeError:  # of `chat | head`
        return 0
    return 0


def _handle_generate(arguments: argparse.Namespace) -> int:
    from megatron_r1.pipeline.talk.generate import WantedResponses, generate

    model = _find_talk_model(arguments, arguments.batch)
    wanted = WantedResponses(
        arguments.input,
        arguments.output,
        _sampling(arguments, model, arguments.samples),
        arguments.seed,
        arguments.batch,
        arguments.logprobs,
    )
    generate(model, wanted)
    return 0


def _handle_serve(arguments: argparse.Namespace) -> int:
    from megatron_r1.pipeline.talk.serve import Address, serve

    model = _find_talk_model(arguments, 16)
    name = arguments.name or arguments.model.resolve().name
    serve(model, Address(arguments.host, arguments.port, name, arguments.api_key_file))
    return 0


def _find_talk_model(arguments: argparse.Namespace, sequences: int) -> TalkModel:
    from megatron_r1.pipeline.talk.model import find_model

    return find_model(arguments.model, arguments.step, arguments.overrides, arguments.context, sequences)


def _sampling(arguments: argparse.Namespace, model: TalkModel, samples: int) -> Sampling:
    """What the options ask for, else what the run did."""
    from megatron_r1.types import Sampling

    rollout = model.config.rollout
    temperature = rollout.temperature if arguments.temperature is None else arguments.temperature
    return Sampling(samples, temperature, arguments.top_p or rollout.top_p, arguments.max_tokens or model.most_tokens)


def _count_from_one(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) >= 1 << 62:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:  # `types.MOST_TEMPERATURE`, which stands beside numpy
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 2")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and at most 1")
    return value
