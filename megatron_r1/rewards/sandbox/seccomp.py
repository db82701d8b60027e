"""The seccomp filters of the sandbox: an allow-list of system calls, assembled into classic BPF.

What is not on the list answers ENOSYS, as on a kernel that never had it, so that libraries take their older path (glibc: clone3 ->
clone). So there are no sockets, no ptrace, no mount, no unshare, no keyctl, bpf, io_uring, perf_event_open, userfaultfd,
process_vm_*, kexec, modules, memfd, SysV IPC, inotify, file locks or times of files (the devices are the host's own), nor what a
later kernel adds. Where a call is allowed for some arguments only (clone, mmap, kill, ioctl, fcntl, ...), the others answer EPERM.
What would reach the host's disk (fsync) answers 0 and does nothing. Another architecture's calls kill.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable

#: (x86_64, aarch64) numbers, from asm/unistd_64.h and asm-generic/unistd.h; None: the architecture has no such call
_EVERYONE: dict[str, tuple[int | None, int | None]] = {
    # files: what can be written is decided by the mounts
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "preadv": (295, 69), "pwritev": (296, 70), "open": (2, None), "openat": (257, 56), "close": (3, 57),
    "lseek": (8, 62), "stat": (4, None), "lstat": (6, None), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "truncate": (76, 45),
    "ftruncate": (77, 46), "fallocate": (285, 47),
    "umask": (95, 166), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "sendfile": (40, 71),
    # memory: bounded by RLIMIT_AS and `supervisor.RunningTest.watch`
    "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "membarrier": (324, 283),
    # signals; for `kill` see below
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "pause": (34, None), "alarm": (37, None),
    # oneself
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getresuid": (118, 148), "getresgid": (120, 150), "getcpu": (309, 168), "getpriority": (140, 141),
    "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164), "arch_prctl": (158, None), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278),
    # threads, time, and the end
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "futex": (202, 98),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "time": (201, None), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "times": (100, 153), "getitimer": (36, 102), "setitimer": (38, 103),
    "execve": (59, 221), "wait4": (61, 260), "waitid": (247, 95), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_SUPERVISOR_ONLY: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "recvmsg": (47, 212), "sendmsg": (46, 211), "sendto": (44, 206),
    "recvfrom": (45, 207), "pidfd_open": (434, 434),
}  # fmt: skip
_IGNORED = ((74, 82), (75, 83), (26, 227))  #: fsync, fdatasync, msync: also of a file that is open for reading
_CLONE, _IOCTL, _FCNTL, _PRCTL, _PRLIMIT = (56, 220), (16, 29), (72, 25), (157, 167), (302, 261)
_MMAP, _CLOSE_RANGE, _KILL_CALL, _TGKILL = (9, 222), (436, 436), (62, 129), (234, 131)

_NEW_NAMESPACES = 0x7E020000  #: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_CLONE_THREAD, _CLONE_FILES = 0x00010000, 0x00000400
#: an anonymous mapping that is shared keeps its pages while one of them is mapped, so no limit of the address space counts them
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_CLOSE_RANGES = (0, 4)  #: CLOSE_RANGE_CLOEXEC; not UNSHARE: every thread would have as many pipes as a process may
_OWN_PID = 0x5231504F  #: stands for the id of the process that installs the filter
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  #: TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)  #: F_DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, GETPIPE_SZ: no locks, no leases
_PRCTLS = (15, 16, 0x53564D41)  #: PR_SET_NAME, PR_GET_NAME, PR_SET_VMA
_SUPERVISOR_PRCTLS = (22, 38, 41)  #: PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  #: column of the tables, AUDIT_ARCH
_X32_BIT = 0x40000000

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  #: offsets in struct seccomp_data; the low half of an argument comes first
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def supported_machines() -> tuple[str, ...]:
    """Values of platform.machine() for which there is a filter."""
    return tuple(_MACHINES)


def build_filter(machine: str, supervisor: bool) -> bytes:
    """An array of struct sock_filter.

    Args:
        machine: one of `supported_machines`.
        supervisor: may also start and signal processes, receive file descriptors and add a filter: process 1 and the compiler. A
            program under test starts threads only, which share its descriptors, and signals itself only: its filter has
            `own_pid_bytes` in place of that process's id.
    """
    column, arch = _MACHINES[machine]
    calls = {**_EVERYONE, **(_SUPERVISOR_ONLY if supervisor else {})}
    code = [_op(_LOAD, _ARCH), _op(_EQUAL, arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    code += [_op(_AT_LEAST, _X32_BIT, 0, 1), _op(_RETURN, _KILL)]
    for numbers in calls.values():
        if numbers[column] is not None:
            code += [_op(_EQUAL, numbers[column], 0, 1), _op(_RETURN, _ALLOW)]
    for ignored in _IGNORED:
        code += [_op(_EQUAL, ignored[column], 0, 1), _op(_RETURN, _ERRNO)]
    code += _rule(_CLONE[column], 0, _clone_check(must_be_thread=not supervisor))
    code += _rule(_MMAP[column], 3, [_op(_ANY_BIT, _MAP_SHARED, 0, 1), _op(_ANY_BIT, _MAP_ANONYMOUS, 1, 0), _op(_RETURN, _ALLOW)])
    code += _rule(_CLOSE_RANGE[column], 2, _one_of(_CLOSE_RANGES))
    for call in (_KILL_CALL, _TGKILL):
        code += _rule(call[column], 0, [_op(_RETURN, _ALLOW)] if supervisor else _one_of((_OWN_PID,)))
    code += _rule(_IOCTL[column], 1, _one_of(_IOCTLS))
    code += _rule(_FCNTL[column], 1, _one_of(_FCNTLS))
    code += _rule(_PRCTL[column], 0, _one_of((*_PRCTLS, *_SUPERVISOR_PRCTLS) if supervisor else _PRCTLS))
    code += _rule(_PRLIMIT[column], 0, _one_of((0,)))  # pid 0: oneself, not process 1
    code.append(_op(_RETURN, _ERRNO | errno.ENOSYS))
    return b"".join(code)


def own_pid_bytes() -> bytes:
    """What the process that installs a program's filter replaces by its own id, as four bytes of the machine's order."""
    return _OWN_PID.to_bytes(4, sys.byteorder)


def _rule(number: int, argument: int, check: list[bytes]) -> list[bytes]:
    """For call `number`, load an argument and run `check`, which falls through if the call is refused."""
    body = [_op(_LOAD, _ARGUMENTS + 8 * argument), *check, _op(_RETURN, _ERRNO | errno.EPERM)]
    return [_op(_EQUAL, number, 0, len(body)), *body]


def _one_of(values: Iterable[int]) -> list[bytes]:
    return [instruction for value in values for instruction in (_op(_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW))]


def _clone_check(must_be_thread: bool) -> list[bytes]:
    """No new namespaces. The kernel reads the low 32 bits of the flags only."""
    allow = [_op(_RETURN, _ALLOW)]
    if must_be_thread:
        allow = [_op(_ANY_BIT, _CLONE_THREAD, 0, 2), _op(_ANY_BIT, _CLONE_FILES, 0, 1), *allow]
    return [_op(_ANY_BIT, _NEW_NAMESPACES, len(allow), 0), *allow]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter {u16 code; u8 jt; u8 jf; u32 k}"""
    return struct.pack("=HBBI", code, if_true, if_false, value)
