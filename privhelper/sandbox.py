"""A child that holds one file system and nothing else, made before it reads its first hostile byte.

Rule 1: it has no capability of the host: it is root of a user namespace of its own, whose ids are host ids that own
nothing; only the one detached mount shows its files under these ids (an idmapped mount, mount_setattr(2)).
Rule 2: it holds that mount's root, its input and one result pipe; chroot, Landlock and seccomp leave it no other path,
no socket, no program, no device.
Rule 3: what it reports is a line of a fixed form, read as if it were hostile.
Rule 4: it dies with the helper.
"""

import gc
import os
import re
import resource
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from privhelper import kernel, manifest
from privhelper.errors import code_of
from privhelper.files import closing
from privhelper.policy import Policy

_TOLD: Final = re.compile(
    rb"(progress|done) ([0-9]{1,20}) ([0-9]{1,20})|(rejected|no_room|fault) ([a-z_]{1,64}) ([0-9]{1,20}) ([ -~]{0,400})"
)
_MAX_REPORT_BYTES: Final = 1024
_END_S: Final = 10.0  # between the end of its reports and its own end lies the tearing down of its memory
Work = Callable[[int, Callable[[int, int], None]], tuple[int, int]]


class Report(NamedTuple):
    """One line that the child wrote: ``progress`` and ``done`` have counts, the others a rule, an entry, a message."""

    kind: str
    entries: int = 0
    content_bytes: int = 0
    rule: str = ""
    entry: int = 0
    message: str = ""


class Child:
    """A running child. Its owner reads reports until there is none, then reaps it."""

    def __init__(self, pid: int, results: int) -> None:
        self.pid = pid
        self.results = results
        self._rest = b""

    def read(self) -> list[Report] | None:
        """Return the reports that have come; None at the end. A line of another form is a fault."""
        data = os.read(self.results, 65_536)
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_REPORT_BYTES:
            whole.append(self._rest)
            self._rest = b""
        return [_report(line) for line in whole]

    def end(self, kill: bool) -> str:
        """Wait for the child; return how it ended if that was not by exit(0).

        It is killed when asked to, or when it has closed its pipe and lives on.
        """
        try:
            if not kill:
                with closing(os.pidfd_open(self.pid)) as handle:
                    select.select([handle], [], [], _END_S)
        finally:
            os.kill(self.pid, signal.SIGKILL)  # not reaped yet: the number is still its own; what has ended stays so
            status = os.waitpid(self.pid, 0)[1]
            os.close(self.results)
        if os.WIFSIGNALED(status):
            return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"exit status {os.WEXITSTATUS(status)}" if status else ""


def _report(line: bytes) -> Report:
    match = _TOLD.fullmatch(line)
    if match is None:
        return Report("fault", message=f"the child wrote {line[:64]!r}")
    if match[1]:
        return Report(match[1].decode(), int(match[2]), int(match[3]))
    return Report(match[4].decode(), rule=match[5].decode(), entry=int(match[6]), message=match[7].decode())


def start(policy: Policy, role: str, mount: int, inputs: Sequence[int], work: Work) -> Child:
    """Fork a child that does ``work`` as ``role`` of policy/authority.toml on a detached mount.

    The mount gets the child's id map. ``work`` is called with a descriptor of the mount's root and a function that
    reports progress; it finds ``inputs`` under their numbers and returns what it did, in entries and bytes.
    """
    results, tell = os.pipe2(os.O_CLOEXEC)
    wait, go = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError:
        for end in (results, tell, wait, go):
            os.close(end)
        raise
    if pid == 0:
        try:
            os.close(go)  # else it would wait on itself for ever when the helper dies before it says go
            os.close(results)
            _run(policy, role, mount, inputs, tell, wait, work)
        finally:
            os._exit(70)  # EX_SOFTWARE: _run ends by itself
    child = Child(pid, results)
    try:
        os.close(tell)
        os.close(wait)
        if os.read(results, 3) == b"up\n":  # else the child is gone; its end tells why
            _map_ids(pid, mount, policy.settings["populate"])
            os.write(go, b"!")
    except BaseException:
        child.end(kill=True)
        raise
    finally:
        os.close(go)
    return child


def _map_ids(pid: int, mount: int, settings: Mapping[str, Any]) -> None:
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
            file.write(f"0 {settings['first_host_id']} {settings['id_count']}")
    with closing(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
        kernel.map_mount_ids(mount, namespace)


def _run(policy: Policy, role: str, mount: int, inputs: Sequence[int], tell: int, wait: int, work: Work) -> None:
    """Lock the child in, do the work, tell how it went, exit."""
    gc.disable()  # garbage of the helper must not close descriptors that are ours now
    kernel.enter_user_namespace()
    os.write(tell, b"up\n")
    if os.read(wait, 1) != b"!":
        os._exit(70)

    def progress(entries: int, content_bytes: int) -> None:
        os.write(tell, b"progress %d %d\n" % (entries, content_bytes))

    try:
        root = _lock(policy, role, mount, inputs, tell)
        os.write(tell, b"done %d %d\n" % work(root, progress))
    except manifest.RejectedError as error:
        os.write(tell, _line("rejected", error.rule, error.entry, str(error)))
    except OSError as error:
        os.write(tell, _line(code_of(error), "system_error", 0, str(error)))
    except BaseException as error:
        os.write(tell, _line("fault", "bug", 0, f"{type(error).__name__}: {error}"))
    os._exit(0)


def _line(kind: str, rule: str, entry: int, message: str) -> bytes:
    text = message.encode("ascii", "backslashreplace").translate(None, bytes(range(32)))[:400]
    return f"{kind} {rule} {entry} ".encode() + text + b"\n"


def _lock(policy: Policy, role: str, mount: int, inputs: Sequence[int], tell: int) -> int:
    """Give everything up; the order matters. Return a descriptor of the mount's root."""
    grant = policy.authority[role]
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    root = kernel.open_root(mount)
    _close_all_but((root, tell, *inputs))
    os.fchdir(root)
    os.chroot(".")
    os.umask(0)
    nothing = (0, 0)
    for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        resource.setrlimit(limit, nothing)
    resource.setrlimit(resource.RLIMIT_AS, (policy.settings["populate"]["memory_bytes"],) * 2)
    kernel.keep_capabilities(grant["capabilities_in_namespace"])
    kernel.forbid_dumping()
    kernel.set_no_new_privs()
    kernel.restrict_beneath(root, grant["landlock"])
    kernel.die_with_parent()
    if _is_orphan(tell):
        os._exit(70)
    kernel.install_seccomp(policy.filters[role])
    return root


def _close_all_but(kept: Sequence[int]) -> None:
    low = 0
    for descriptor in (*sorted(kept), 1 << 16):
        os.closerange(low, descriptor)
        low = descriptor + 1


def _is_orphan(tell: int) -> bool:
    """Tell whether the helper went before ``die_with_parent`` took hold: then nobody reads the pipe."""
    poll = select.poll()
    poll.register(tell, 0)
    return bool(poll.poll(0))
