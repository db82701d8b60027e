"""A stand-in for a served model, for the small R1 pipeline alone: rules behind the OpenAI-compatible protocol, no model.

It answers what `data.source=tally_chat` makes the pipeline ask: cold-start answers, translations and summaries of thinking, chains
of thought before a reply, and the judge's grades. Anything else gets HTTP 400.

    python tools/serve_tally_rules.py --port 8901
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_r1.curation.cold_start_prompts import TRANSLATION
from megatron_r1.data.tally.arithmetic import TallyProblem, chain_of_thought
from megatron_r1.data.tally.requests import find_thought

NAME = "tally-rules"
_EXPRESSION = re.compile(r"(\d+)((?:[+-]\d+)+)")
_BOXED = re.compile(r"\\boxed\{(\d+)\}")


def read_problem(text: str) -> TallyProblem:
    """The first tally question of a text. Raises ValueError if there is none."""
    found = _EXPRESSION.search(text)
    if found is None:
        raise ValueError("there is no tally question here")
    moves = tuple(int(move) for move in re.findall(r"[+-]\d+", found[2]))
    return TallyProblem("zh" if "求" in text else "en", int(found[1]), moves)


def think(problem: TallyProblem) -> str:
    """The running tally in the question's language, without a mistake."""
    return chain_of_thought(random.Random(0), problem, len(problem.moves))[0]


def summarise(problem: TallyProblem, result: int) -> str:
    """The summary of an answer."""
    return f"共\\boxed{{{result}}}。" if problem.language == "zh" else f"So \\boxed{{{result}}}."


def answer(messages: list[dict[str, str]]) -> str:
    """What the rules say to a conversation. Raises ValueError if no rule fits."""
    text = messages[-1]["content"]
    if "'correctness'" in text:
        return _grade(text)
    if "## Answer\n" in text and "## Request\n" in text:
        return find_thought(text.partition("## Request\n")[2].partition("\n\n## Answer")[0])
    if "## Thought process\n" in text:
        question, _, rest = text.partition("## Question\n")[2].partition("\n\n## Thought process\n")
        thinking = rest.partition("\n\n---\n")[0]
        problem = read_problem(question)
        if TRANSLATION in text or "Rewrite the thought process" in text:
            return think(problem)
        return summarise(problem, int(re.findall(r"\d+", thinking)[-1]))
    problem = read_problem(text.rpartition("## Question\n")[2])
    return f"<think>\n{think(problem)}\n</think>\n\n{summarise(problem, problem.answer)}"


def _grade(text: str) -> str:
    payloads = [json.loads(found) for found in re.findall(r"<data-\w+>\n(.*)\n</data-\w+>", text)]
    _, reference, given = payloads[-3:]
    boxed = _BOXED.findall(given)
    is_correct = bool(boxed) and boxed[-1] == reference.strip()
    analysis = f"the last boxed number is {boxed[-1] if boxed else 'missing'}, the reference is {reference}"
    return json.dumps({"analysis": analysis, "correctness": "correct" if is_correct else "incorrect"})


def make_handler(reply: Callable[[list[dict[str, str]]], str]) -> type[BaseHTTPRequestHandler]:
    """A handler of POST /v1/chat/completions."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                message = {"role": "assistant", "content": reply(body["messages"])}
                status, result = 200, {"model": NAME, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            except (ValueError, KeyError, IndexError, TypeError) as error:
                status, result = 400, {"error": {"message": f"no rule answers this: {error}"}}
            content = json.dumps(result).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=8901, help="on 127.0.0.1")
    port = parser.parse_args(argv).port
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), make_handler(answer))
    except OSError as error:
        print(f"serve_tally_rules: error: port {port}: {error.strerror}; choose another --port", file=sys.stderr)
        return 2
    print(f"{NAME}: rules, no model, at http://127.0.0.1:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
