"""Confinement of the process that parses what a guest wrote.

After confine() the process can compute, and read and write what it has open; nothing else: no opening of files, no
sockets, no new processes or threads, no signals to others. That is a seccomp filter of allowed system calls, with
no_new_privs, beside limits on memory, file size and open files, and user nobody when it was root. Other calls fail
with EPERM; those that a parser never makes unless somebody has taken it over end the process. There is no way to run
without it: where the kernel or libseccomp cannot, it raises.

Source: seccomp(2), libseccomp's seccomp_rule_add(3), setrlimit(2).
"""

from __future__ import annotations

import errno
import os
import resource

MEMORY_BYTES = 1024 * 1024 * 1024
_NOBODY = 65534

_ALLOWED = (
    "read", "readv", "pread64", "preadv", "write", "writev", "lseek", "close", "fstat", "newfstatat",
    "recvfrom", "recvmsg", "sendto", "sendmsg", "poll", "ppoll", "select", "pselect6", "fcntl",
    "brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "futex", "getrandom",
    "clock_gettime", "clock_nanosleep", "gettimeofday", "getpid", "gettid", "getuid", "geteuid", "getgid", "getegid",
    "setitimer", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall",
    "exit", "exit_group",
)  # fmt: skip
_FATAL = (
    "execve", "execveat", "fork", "vfork", "clone", "clone3", "socket", "socketpair", "connect", "bind", "ptrace",
    "process_vm_readv", "process_vm_writev", "mount", "unshare", "setns", "bpf", "init_module", "kill", "tgkill",
)  # fmt: skip


def confine() -> None:
    """Give up every right but those of the module's text. Cannot be undone.

    Raises OSError or RuntimeError when the kernel or libseccomp cannot; the process must end then.
    """
    import pyseccomp  # while files can be opened

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    only = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in _ALLOWED:
        only.add_rule(pyseccomp.ALLOW, name)
    for name in _FATAL:
        only.add_rule(pyseccomp.KILL_PROCESS, name)
    only.load()
