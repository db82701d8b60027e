"""What the tests of `preprocess` share: a small tokenizer, texts, and ranks in threads."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import deque
from pathlib import Path
from typing import Any

from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import DataError

TEXTS = [
    "Natalia sold 48 clips in April, and half as many in May.",
    "答案是七十二。",
    "Line one.\nLine two.\n\n  indented\tand more ",
]


def save_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer with BOS, written into `folder`."""
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    tokenizer.save(folder)
    return tokenizer


def many_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of very different lengths; every one is another."""
    generator = random.Random(seed)
    words = [*" ".join(TEXTS).split(), "<eos>", "<think>", "naïve", "🙂", "\u2028", "x" * 40]
    return [f"{n} " + " ".join(generator.choices(words, k=generator.choice((1, 5, 30, 200)))) for n in range(count)]


def write_lines(path: Path, texts: list[Any], field: str = "text") -> Path:
    """A .jsonl file, with a blank line here and there."""
    lines = [
        json.dumps({"id": n, field: text}, ensure_ascii=n % 2 == 0) + "\n" * (1 + (n % 7 == 0)) for n, text in enumerate(texts)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def fail_or_die(bench: Any, task: str, report: Any) -> None:
    """Work that fails, or ends its process as the kernel does when memory runs out."""
    if task == "fail":
        raise DataError("told by a process")
    os.kill(os.getpid(), signal.SIGKILL)


class ThreadComm:
    """Ranks of MPI as threads of one process: the methods of mpi4py that `Ranks` calls."""

    def __init__(self, rank: int, shared: dict[str, Any]) -> None:
        self._rank, self._shared = rank, shared

    @classmethod
    def world(cls, size: int) -> list[ThreadComm]:
        """One for each rank."""
        shared: dict[str, Any] = {"size": size, "barrier": threading.Barrier(size), "slots": [None] * size}
        shared["boxes"] = [{} for _ in range(size)]
        return [cls(rank, shared) for rank in range(size)]

    def Get_size(self) -> int:
        return self._shared["size"]

    def Get_rank(self) -> int:
        return self._rank

    def barrier(self) -> None:
        self._shared["barrier"].wait(30)

    def allgather(self, value: Any) -> list[Any]:
        self._shared["slots"][self._rank] = value
        self.barrier()
        found = list(self._shared["slots"])
        self.barrier()
        return found

    def bcast(self, value: Any, root: int) -> Any:
        return self.allgather(value)[root]

    def isend(self, value: Any, dest: int, tag: int) -> ThreadComm:
        self._shared["boxes"][dest].setdefault(tag, deque()).append(value)
        return self

    def Test(self) -> bool:
        return True

    def iprobe(self, tag: int) -> bool:
        return bool(self._shared["boxes"][self._rank].get(tag))

    def recv(self, tag: int) -> Any:
        return self._shared["boxes"][self._rank][tag].popleft()

    def Abort(self, code: int) -> None:
        self._shared["barrier"].abort()
