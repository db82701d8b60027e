"""A scorer for tests of the scoring pool that does what the response says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from megatron_r1.errors import RewardError
from megatron_r1.rewards.protocol import Verdict


class OddScorer:
    """ "echo 0.5" scores 0.5; the others misbehave."""

    name = "odd"

    def __init__(self, refuses: bool = False, exits: bool = False):
        if refuses:
            raise ValueError("no such setting")
        if exits:
            os._exit(7)
        self.kept: list[bytearray] = []

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`."""
        command, _, argument = response.partition(" ")
        if command == "echo":
            return Verdict(float(argument), "correct" if float(argument) else "wrong", f"{reference!r}")
        if command == "sleep":
            time.sleep(float(argument))
        elif command == "wait":
            while not os.path.exists(argument):
                time.sleep(0.01)
        elif command == "meet":
            open(os.path.join(argument, str(os.getpid())), "w").close()
            while len(os.listdir(argument)) < 2:
                time.sleep(0.01)
        elif command == "spin":
            9**9**9  # one call that never returns to the interpreter: no signal and no thread can end it
        elif command == "child":
            print(subprocess.Popen(["sleep", "600"]).pid, flush=True)  # into the worker's log
            time.sleep(600)
        elif command == "segfault":
            os.kill(os.getpid(), 11)
        elif command == "exit":
            sys.exit(0)
        elif command == "hard-exit":
            os._exit(0)
        elif command == "leave":
            os.closerange(3, 64)  # the socket, as at the end of a process on a busy machine
            time.sleep(0.5)
            os._exit(9)
        elif command == "allocate":
            bytearray(int(argument))
        elif command == "keep":
            self.kept.append(bytearray(int(argument)))
            self.kept[-1][::4096] = b"x" * len(self.kept[-1][::4096])
        elif command == "raise":
            raise ValueError("first line\nsecond line")
        elif command == "refuse":
            raise RewardError("there is no sandbox here")
        elif command == "lie":
            return None
        return Verdict(1.0, "correct", parts={"pid": os.getpid()})
