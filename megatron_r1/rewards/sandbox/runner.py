"""Process 1 of a sandbox. It starts every test in a process of its own, ends it, and says how it ended.

This file runs inside, under any Python from 3.9, and imports nothing of the project but values.py and remote.py, here called
sandbox_values and sandbox_remote. It holds no expected outputs and never sees the bytes that a test reads or writes: those pass
through descriptors that arrive over the control socket (fd 0) and go to one child. As process 1 it cannot be killed or stopped
from inside. The child's filter allows no ptrace, process_vm_* or pidfd_getfd, and there is no /proc, so the memory and the
descriptors of process 1 are out of reach.

Messages are JSON, one packet each. First the configuration, in a descriptor of any length, answered by {"ready": true}; then tests,
each answered by {"started": true}, which the child sends, so that the outside learns its process id, and by an ending. The outside
may send {"end": why} at any time; if no test is under way, it came too late and means nothing.
"""

import _socket  # the module socket costs as much start-up time as all the others together
import builtins
import ctypes
import fcntl
import json
import math
import os
import resource
import select
import signal
import sys
import time
import types

import sandbox_remote
import sandbox_values

CONTROL, RESULT = 0, 3  #: descriptors: of the control socket here, of the result in a child
DESCRIPTOR_BYTES = 4
SLICE_MILLISECONDS = 50  #: between looks at what a test has put into its folder
MAX_FILES = 1000  #: in that folder: each costs kernel memory that no limit of the file system counts
MAX_DESCRIPTORS = 4096
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 1, 22, 38, 41


def supervise():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a handler would make process 1 reachable
    control = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, CONTROL)
    _, (descriptor,) = receive(control)
    with os.fdopen(descriptor, "rb") as file:
        config = json.loads(file.read())
    if os.getpid() != 1:  # without namespaces nothing else ends this process when its parent is gone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    namespace = load_prelude(config)
    untouched = os.stat(config["folder"]).st_ctime_ns
    control.send(b'{"ready": true}')
    while True:
        message, descriptors = receive(control)
        if message is None:
            return
        if not descriptors:
            continue  # an end that came too late
        ending = run_test(config, message, descriptors, namespace)
        # The kernel's clock for files ticks slowly: what is written in the tick of the start shows in the listing only.
        ending["touched"] = os.stat(config["folder"]).st_ctime_ns != untouched or bool(os.listdir(config["folder"]))
        control.send(json.dumps(ending).encode())


def receive(control):
    """(message, its descriptors); (None, []) if the outside is gone."""
    message, ancillary, _, _ = control.recvmsg(1 << 16, _socket.CMSG_LEN(4 * DESCRIPTOR_BYTES))
    if not message:
        return None, []
    return json.loads(message), [number for _, _, content in ancillary for number in memoryview(content).cast("i").tolist()]


def load_prelude(config):
    """The module in which programs are run, with what the tests' platform has imported; shared by forking."""
    builtins.exit = builtins.quit = sys.exit  # this interpreter runs without `site`, which defines them
    module = types.ModuleType("solution")
    exec(compile(config["prelude"], "<prelude>", "exec"), module.__dict__)  # noqa: S102
    return module


def run_test(config, test, descriptors, module):
    """Start a child, wait for its end or end it, and clean up after it."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            try:
                be_child(config, descriptors, module)
            except BaseException as error:  # noqa: BLE001
                print(f"{type(error).__name__}: {str(error)[:1000].partition(chr(10))[0]}", file=sys.stderr)
        finally:
            os._exit(1)
    ended_by = wait_for(child, start + test["wall_seconds"], config["folder"])
    if ended_by:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    if os.getpid() == 1:
        end_everything_else()
    if config["collect"] and status == 0:
        copy_file(os.path.join(config["folder"], config["collect"]), descriptors[RESULT])
    for descriptor in descriptors:
        os.close(descriptor)
    code = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "ended_by": ended_by,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.monotonic() - start,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def wait_for(child, deadline, folder):
    """None if the child ended by itself, else why it must be ended: "time" (or the outside is gone), "files", or what that says."""
    handle = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.register(CONTROL, select.POLLIN)
        while not (events := poll.poll(SLICE_MILLISECONDS)):
            if time.monotonic() > deadline:
                return "time"
            usage = os.statvfs(folder)
            if os.getpid() == 1 and usage.f_files - usage.f_ffree > MAX_FILES:
                return "files"
        if any(descriptor == handle for descriptor, _ in events):
            return None
        message = os.read(CONTROL, 1 << 16)
        return json.loads(message)["end"] if message else "time"
    finally:
        os.close(handle)


def copy_file(path, target):
    """Hand a file that the child left behind, the compiler's output, to the outside, if there is one."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        while os.sendfile(target, file.fileno(), None, 1 << 20):
            pass


def end_everything_else():
    """Process 1 only: kill(-1) reaches every other process of the namespace, and nothing outside of it."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def be_child(config, descriptors, module):
    """Take the test's descriptors, give up everything else, run. Does not return if the program is a command."""
    os.write(CONTROL, b'{"started": true}')
    out_of_the_way = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in descriptors]
    for target, descriptor in enumerate(out_of_the_way):
        os.dup2(descriptor, target)
    os.closerange(len(descriptors), MAX_DESCRIPTORS)
    for number in range(1, signal.NSIG):
        # A scheduler that asks a job to stop signals programs, too, which must not fail for it: those two stay ignored.
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1, signal.SIGTERM):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass  # the two numbers that libc keeps to itself
    os.chdir(config["folder"])
    if config["kind"] == "command":
        set_limits(config["limits"])
        install_filter(config["filter"], config["own_pid"])
        os.execve(config["command"][0], config["command"], config["environment"])
    request = b""
    while config["kind"] == "function" and (piece := os.read(0, 1 << 20)):
        request += piece
    sys.path[:] = [*config["packages"], *(entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["solution"] = sys.modules["__main__"] = module
    sys.argv = ["solution"]
    sys.setrecursionlimit(config["recursion_depth"])
    set_limits(config["limits"])
    install_filter(config["filter"], config["own_pid"])
    if config["kind"] == "check":
        be_check(config, module.__dict__)
    else:
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        result = json.dumps(call_function(config, json.loads(request), module.__dict__)).encode()
        write_bytes(RESULT, result)
    sys.stdout.flush()
    os._exit(0)  # whatever the program registered to run at exit stays unrun


def call_function(config, request, namespace):
    """Run the program, the test's set-up and the call, and return the encoded value. Raises whatever the program raises.

    With `steps`, the answer of `sandbox_remote.carry_out`.
    """
    exec(compile(config["before"], "<before>", "exec"), namespace)  # noqa: S102
    with open(config["source"], "rb") as file:
        exec(compile(file.read(), "main.py", "exec"), namespace)  # noqa: S102
    exec(compile(request["setup"], "<setup>", "exec"), namespace)  # noqa: S102
    if request.get("steps"):
        candidate = eval(compile(request["expression"], "<test>", "eval"), namespace)
        return sandbox_remote.carry_out(candidate, request["steps"])
    if request["arguments"] is None:
        return sandbox_values.encode_value(eval(compile(request["expression"], "<test>", "eval"), namespace))
    function = eval(compile(request["expression"], "<test>", "eval"), namespace)
    positional, named = (sandbox_values.decode_value(part) for part in request["arguments"])
    return sandbox_values.encode_value(function(*positional, **named))


def be_check(config, namespace):
    """Run the tests' own code, confined all the same. Calls of the candidate are answered from outside (fd 0).

    Exit code 0: every assertion held; 3: the outside ended it; 4: an assertion failed; 1: the check itself raised.
    """
    answers = os.fdopen(os.dup(0), "rb")

    def ask(steps):
        write_bytes(0, json.dumps(steps).encode() + b"\n")
        answer = answers.readline()
        if not answer:
            os._exit(3)
        return json.loads(answer)

    candidate = sandbox_remote.make_candidate(ask)
    with open(config["source"], "rb") as file:
        source = file.read()
    try:
        exec(compile(config["check_prelude"], "<prelude>", "exec"), namespace)  # noqa: S102
        namespace.update(dict.fromkeys(config["candidate_names"], candidate))
        exec(compile(source, "<check>", "exec"), namespace)  # noqa: S102
    except AssertionError:
        os._exit(4)


def write_bytes(descriptor, content):
    while content:
        content = content[os.write(descriptor, content) :]


def set_limits(limits):
    seconds = math.ceil(limits["cpu_seconds"])
    for which, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["output_bytes"], limits["output_bytes"]),
        (resource.RLIMIT_STACK, limits["stack_bytes"], limits["stack_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_SIGPENDING, 64, 64),
    ):
        _, most = resource.getrlimit(which)  # the trainer's own limits, if any, hold as well
        bound = most if most != resource.RLIM_INFINITY else hard
        resource.setrlimit(which, (min(soft, bound), min(hard, bound)))
    # Of a huge page, all memory stays while one small page of it is mapped, and only that one is counted.
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    if os.getppid() == 1:  # counted within the namespace, process 1 with it; without one, all of the user's processes would count
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["threads"] + 1, limits["threads"] + 1))


def install_filter(filter_hex, own_pid_hex):
    """Empty: none, as for the compiler. Where the second stands in the first, this process's id belongs."""
    if not filter_hex:
        return

    class Program(ctypes.Structure):
        """struct sock_fprog"""

        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    content = bytes.fromhex(filter_hex).replace(bytes.fromhex(own_pid_hex), os.getpid().to_bytes(4, sys.byteorder))
    program = Program(len(content) // 8, content)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    supervise()
