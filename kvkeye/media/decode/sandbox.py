"""What a decoding worker gives up before it sees a stranger's bytes: memory, time, files, sockets, other programs.

Linux on x86-64 and arm64. Limits of the process hold everywhere on POSIX; the filter of system calls is Linux's.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import struct

_X86_64, _ARM64 = 0xC000003E, 0xC00000B7  # as the kernel names the two in a filter
# System calls that a decoder has no use for, by number on x86-64 and on arm64 (None: does not exist there). Memory,
# threads and the files already open remain.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "creat": (85, None), "openat": (257, 56), "openat2": (437, 437),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "shmget": (29, 194),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kill": (62, 129),
    "tkill": (200, 130), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "truncate": (76, 45), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmodat": (268, 53), "chown": (92, None), "lchown": (94, None),
    "fchownat": (260, 54), "mount": (165, 40), "umount2": (166, 39), "setns": (308, 268), "unshare": (272, 97),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_PRLIMIT = (302, 261)
_SECCOMP = (317, 277)
_CLONE_THREAD = 0x10000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AND_SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # load a word, jump if equal, jump if bits are set, return
_NUMBER, _ARCH, _ARG0 = 0, 4, 16  # offsets in the kernel's record of a call


def limit_process(max_memory: int, max_files: int) -> None:
    """Address space in bytes and open files; no core dumps, no new files on disk."""
    _lower(resource.RLIMIT_AS, max_memory)
    _lower(resource.RLIMIT_NOFILE, max_files)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)


def limit_cpu(seconds: float) -> None:
    """CPU time from now on, all threads together; the kernel ends the process after it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _lower(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def filter_calls() -> bool:
    """Refuses the calls above for all threads of this process, for good. False where the kernel offers no filter."""
    machines = {"x86_64": (0, _X86_64), "aarch64": (1, _ARM64)}
    if platform.system() != "Linux" or platform.machine() not in machines:
        return False
    which, arch = machines[platform.machine()]
    program = _program(which, arch)
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    record = Program(len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # no new privileges: a condition of the filter
        return False
    mode, all_threads = 1, 1
    return int(libc.syscall(_SECCOMP[which], mode, all_threads, ctypes.byref(record))) == 0


def _program(which: int, arch: int) -> bytes:
    """The filter, 8 bytes per instruction."""
    steps: list[tuple[int, int, int, int]] = []  # operation, jump if true, jump if false, value

    def answer(value: int) -> tuple[int, int, int, int]:
        return (_RETURN, 0, 0, value)

    steps += [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), answer(_KILL), (_LOAD, 0, 0, _NUMBER)]
    if arch == _X86_64:
        steps += [(_AND_SET, 0, 1, 0x40000000), answer(_ERRNO | _ENOSYS)]  # the second numbering of the same calls
    for numbers in _REFUSED.values():
        if numbers[which] is not None:
            steps += [(_EQUAL, 0, 1, numbers[which] or 0), answer(_ERRNO | _EPERM)]
    steps += [(_EQUAL, 0, 1, _CLONE3[which]), answer(_ERRNO | _ENOSYS)]  # the library then uses clone
    steps += [(_EQUAL, 0, 3, _CLONE[which]), (_LOAD, 0, 0, _ARG0), (_AND_SET, 5, 0, _CLONE_THREAD)]
    steps += [answer(_ERRNO | _EPERM)]
    steps += [(_EQUAL, 0, 3, _PRLIMIT[which]), (_LOAD, 0, 0, _ARG0), (_EQUAL, 1, 0, 0), answer(_ERRNO | _EPERM)]
    steps += [answer(_ALLOW)]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
