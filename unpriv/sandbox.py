"""Lock this process before it meets its first hostile byte, and prove that each lock took.

Rule 1: what is granted stands in policy/syscalls/*.seccomp and in the caller's arguments; everything else is denied.
Rule 2: resource limits, no_new_privs and seccomp are required. Landlock is required wherever the kernel has it.
Rule 3: a lock that does not take raises SandboxError; the caller must not go on.

Order matters: Landlock binds the calling thread and what it starts later, so threads are started after it; the resource
limits come then, for they may leave no descriptor for a ruleset and no process for a thread; seccomp comes last and
binds all threads at once (SECCOMP_FILTER_FLAG_TSYNC).
"""

import errno
import os
import resource
import stat
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from unpriv import kernel, seccomp

# landlock(7), LANDLOCK_ACCESS_FS_*
_FS_EXECUTE: Final = 1 << 0
_FS_WRITE_FILE: Final = 1 << 1
_FS_READ_FILE: Final = 1 << 2
_FS_READ_DIR: Final = 1 << 3
_FS_REMOVE_DIR: Final = 1 << 4
_FS_REMOVE_FILE: Final = 1 << 5
_FS_MAKE_DIR: Final = 1 << 7
_FS_MAKE_REG: Final = 1 << 8
_FS_REFER: Final = 1 << 13  # version 2
_FS_TRUNCATE: Final = 1 << 14  # version 3
_FS_IOCTL_DEV: Final = 1 << 15  # version 5
_FS_VERSION_1: Final = (1 << 13) - 1
_NET_BIND_TCP: Final = 1 << 0  # version 4
_NET_CONNECT_TCP: Final = 1 << 1
_SCOPE_ALL: Final = 3  # version 6: abstract Unix sockets, signals

_READ: Final = _FS_READ_FILE | _FS_READ_DIR
_WRITE: Final = (
    _READ | _FS_WRITE_FILE | _FS_REMOVE_DIR | _FS_REMOVE_FILE | _FS_MAKE_DIR | _FS_MAKE_REG | _FS_REFER | _FS_TRUNCATE
)
_ON_FILES: Final = _FS_EXECUTE | _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV

_RLIMITS: Final = {
    "as": resource.RLIMIT_AS,
    "core": resource.RLIMIT_CORE,
    "cpu": resource.RLIMIT_CPU,
    "data": resource.RLIMIT_DATA,
    "fsize": resource.RLIMIT_FSIZE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "msgqueue": resource.RLIMIT_MSGQUEUE,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "stack": resource.RLIMIT_STACK,
}
_THREAD_END_S: Final = 2.0
_ALWAYS: Final = {"core": 0, "memlock": 0, "msgqueue": 0}


class SandboxError(Exception):
    """A required lock did not take: this process must end without reading anything."""


class Rules(NamedTuple):
    """What Landlock leaves open. A path that does not exist is left out and named in the result of lock().

    ``read_beneath``: files and directories that may be read. ``write_beneath``: directories in which regular files and
    directories may also be made, written, renamed and removed. ``tcp``: connecting is allowed; listening never is.
    """

    read_beneath: Sequence[str] = ()
    write_beneath: Sequence[str] = ()
    tcp: bool = False


def lock(
    syscalls: str,
    landlock: Rules,
    rlimits: Mapping[str, int],
    start_threads: Callable[[], None] | None = None,
) -> dict[str, str]:
    """Enter the sandbox for the rest of this process's life; return what took, layer by layer, for a report.

    ``syscalls`` names a policy of policy/syscalls/, which must allow ``prctl arg0 == PR_GET_SECCOMP``, the last proof.
    ``rlimits`` maps the lower-case name of a limit (setrlimit(2)) to its value, soft and hard. ``start_threads`` is
    called when Landlock is in force: the threads that it starts are under every lock, and none can be started later
    unless the policy has the clone calls. Lazy imports, codecs and lookups that need files must have happened before.

    Raises:
        SandboxError: a lock did not take. Some may have: end the process.
    """
    _expect_one_thread()
    try:
        program = seccomp.assemble(seccomp.load(syscalls, kernel.machine()), kernel.machine())
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        took = {"no_new_privs": "on", "landlock": _restrict(landlock)}
        if start_threads is not None:
            start_threads()
        took["rlimits"] = _limit({**_ALWAYS, **rlimits})
        kernel.seccomp_filter(program)
        took["seccomp"] = f"{syscalls}, {len(program) // 8} instructions"
        _prove_seccomp()
    except (OSError, ValueError, seccomp.PolicyError) as error:
        raise SandboxError(str(error)) from error
    return took


def _expect_one_thread() -> None:
    """Demand that this thread is alone. One that was joined is still there for the moment that the kernel takes."""
    end_s = time.monotonic() + _THREAD_END_S
    while (threads := len(os.listdir("/proc/self/task"))) != 1 and time.monotonic() < end_s:
        time.sleep(0.0005)
    if threads != 1:
        raise SandboxError(f"{threads} threads run already; Landlock would bind only one of them")


def _limit(wanted: Mapping[str, int]) -> str:
    """Set the limits, soft and hard, no higher than the hard ones in force, and read them back."""
    for name, value in wanted.items():
        number = _RLIMITS[name]
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
        if resource.getrlimit(number) != (value, value):
            raise SandboxError(f"the resource limit {name} did not take")
    return " ".join(f"{name}={value}" for name, value in sorted(wanted.items()))


def _restrict(rules: Rules) -> str:
    """Put Landlock in force as far as this kernel knows it and prove it by a path that is not granted."""
    version = kernel.landlock_abi()
    if version == 0:
        return "absent: the kernel has it not"
    files, net, scoped = _handled(version, rules.tcp)
    # Older kernels refuse a longer structure (E2BIG), so it ends with the last field that they know.
    attributes = struct.pack("=QQQ", files, net, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = kernel.landlock_ruleset(attributes)
    try:
        missing = _allow(ruleset, rules.read_beneath, _READ & files)
        missing += _allow(ruleset, rules.write_beneath, _WRITE & files)
        kernel.landlock_restrict(ruleset)
    finally:
        os.close(ruleset)
    _prove_landlock(rules)
    absent = f", without {' '.join(missing)}" if missing else ""
    return f"version {version}{absent}"


def _handled(version: int, tcp: bool) -> tuple[int, int, int]:
    files = _FS_VERSION_1
    files |= _FS_REFER if version >= 2 else 0
    files |= _FS_TRUNCATE if version >= 3 else 0
    files |= _FS_IOCTL_DEV if version >= 5 else 0
    net = _NET_BIND_TCP if tcp else _NET_BIND_TCP | _NET_CONNECT_TCP
    return files, net, _SCOPE_ALL


def _allow(ruleset: int, paths: Sequence[str], access: int) -> list[str]:
    missing = []
    for path in paths:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            missing.append(path)
            continue
        try:
            is_directory = stat.S_ISDIR(os.fstat(beneath).st_mode)
            kernel.landlock_allow_beneath(ruleset, beneath, access if is_directory else access & _ON_FILES)
        finally:
            os.close(beneath)
    return missing


def _prove_landlock(rules: Rules) -> None:
    if "/" in (*rules.read_beneath, *rules.write_beneath):
        return
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError as error:
        if error.errno == errno.EACCES:
            return
    raise SandboxError("Landlock did not take: the root directory can still be read")


def _prove_seccomp() -> None:
    """Ask the kernel, by a call that the policy must allow, whether a filter is in force (prctl(2), PR_GET_SECCOMP)."""
    if kernel.prctl(kernel.PR_GET_SECCOMP) != 2:
        raise SandboxError("seccomp did not take")
