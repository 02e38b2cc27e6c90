"""Boot a throw-away virtual machine, run commands in it, cut its power, boot it again from the same disks.

Rule 1: nothing outlives the test: QEMU dies with its owner, overlays lie in a temporary directory.
Rule 2: a command that fails raises, with its output and the end of the console.
Rule 3: KVM is tried for a bounded time and used only if a guest answers under it; else the machine is emulated (TCG).

Killing QEMU loses the guest's memory but not what the guest wrote to its disks: the host's page cache keeps it. It is a
crash of the kernel, not a power cut. For those, give a disk a write log and see blocklog.py.
"""

import base64
import contextlib
import ctypes
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.vm.rootfs import Rootfs, cache_directory

PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
CHUNK_BYTES: Final = 1 << 20
KVM_TRIAL_S: Final = 10.0
BOOT_TIMEOUT_S: Final = 300.0  # 6 s emulated on a quiet host; a busy one needs many times as long
BOOT_ATTEMPTS: Final = 3

#: No AVX: OpenSSL would take code paths that TCG (QEMU 7.2) emulates three to four times slower.
TCG_CPU: Final = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand"

KERNEL_ARGUMENTS: Final = " ".join(
    [
        "console=ttyS0 quiet panic=-1 root=/dev/nvme0n1 rootfstype=ext4 rw",
        # A busy host confuses the calibration of an emulated clock; without these the guest falls back to slow timers.
        "tsc=reliable no_timer_check",
        # Mounts, module loads and device-mapper suspends wait for RCU: make that wait short.
        "rcupdate.rcu_expedited=1 mitigations=off nowatchdog audit=0 random.trust_cpu=on cryptomgr.notests=1",
        # What hardens a kernel at each allocation, copy and system call; of the security modules only the one in use.
        "init_on_alloc=0 kfence.sample_interval=0 hardened_usercopy=off randomize_kstack_offset=off lsm=landlock",
    ]
)


class MachineError(Exception):
    """The machine did not do what it was asked; the text has the end of its console."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw file that the guest sees as /dev/disk/by-id/virtio-SERIAL; ``log`` records every write and flush of it."""

    path: Path
    serial: str
    log: Path | None = None
    read_only: bool = False

    def arguments(self) -> list[str]:
        """Return QEMU's arguments for it; the host does not crash, so flushes need not reach its disk."""
        mode = "read-only=on" if self.read_only else "discard=unmap"
        file = f"driver=raw,{mode},cache.no-flush=on,file.driver=file,file.filename={self.path}"
        nodes = ["-blockdev", f"node-name={self.serial},{file}"]
        if self.log:
            self.log.touch()
            nodes = ["-blockdev", f"node-name={self.serial}-data,{file}"]
            nodes += ["-blockdev", f"node-name={self.serial}-log,driver=file,filename={self.log}"]
            nodes += ["-blockdev", f"node-name={self.serial},driver=blklogwrites,log={self.serial}-log,"
                      f"file={self.serial}-data"]  # fmt: skip
        return [*nodes, "-device", f"virtio-blk-pci,drive={self.serial},serial={self.serial}"]


def blank(path: Path, size_bytes: int) -> Path:
    """Make a sparse file to be used as a disk."""
    with path.open("xb") as file:
        file.truncate(size_bytes)
    return path


def make_file_system(path: Path) -> None:
    """Make an ext4 in a file with nothing left for the guest's kernel to do in the background."""
    words = ["-q", "-F", "-t", "ext4", "-N", "65536", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["/usr/sbin/mke2fs", *words, str(path)], check=True, stdout=subprocess.DEVNULL)


def overlay(backing: Path, path: Path) -> Path:
    """Make a copy-on-write image over another one, which must not change from now on."""
    kind = "qcow2" if backing.suffix == ".qcow2" else "raw"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", kind, "-b", str(backing), str(path)]
    subprocess.run(command, check=True)
    return path


@dataclass(frozen=True, slots=True)
class Result:
    """What a command in the guest gave; ``code`` is negative for a signal."""

    code: int
    out: str
    err: str
    wall_s: float


@dataclass
class Machine:
    """One virtual machine. ``root`` is a qcow2 overlay that this machine may write; as a context manager it boots."""

    kernel: Path
    root: Path
    disks: Sequence[Disk] = ()
    accelerator: str = "tcg"
    memory_mib: int = 1536
    processors: int = 1  # each further one costs the emulator a quarter more for the same work
    boot_timeout_s: float = BOOT_TIMEOUT_S
    boot_attempts: int = BOOT_ATTEMPTS
    boot_s: float = 0.0
    boots: int = 0
    warm: tuple[int, int] = (0, 0)  # of warm.py: the boot in which its program was started, and its number
    last_console: str = ""
    _process: "subprocess.Popen[bytes] | None" = None
    _directory: Path = Path()
    _socket: socket.socket | None = None
    _buffer: bytes = b""
    _number: int = 0
    _answers: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.boot()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def boot(self) -> None:
        """Start QEMU and wait for the agent.

        About one emulated boot in 200 hangs before the first process (an interrupt gets lost, QEMU 7.2 and 10); so a
        machine whose agent does not answer is started again.

        Raises: MachineError.
        """
        for attempt in range(self.boot_attempts):
            try:
                self._boot_once()
            except MachineError:
                self.kill()
                if attempt + 1 == self.boot_attempts:
                    raise
            except BaseException:
                self.kill()
                raise
            else:
                return

    def _boot_once(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="imgpull-vm-"))
        self._buffer, self._answers = b"", {}
        begin_s = time.monotonic()
        with (self._directory / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stderr=stderr, preexec_fn=_die_with_parent
            )
        deadline_s = begin_s + self.boot_timeout_s
        self._socket = self._connect(deadline_s)
        self._answer(0, deadline_s)
        self.boot_s = time.monotonic() - begin_s
        self.boots += 1

    def _command(self) -> list[str]:
        where = self._directory
        cpu = "host" if self.accelerator == "kvm" else TCG_CPU
        command = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", _ACCELERATORS[self.accelerator], "-cpu", cpu,
            "-smp", str(self.processors), "-m", str(self.memory_mib), "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-kernel", str(self.kernel), "-append", KERNEL_ARGUMENTS,
            "-blockdev", f"node-name=root,driver=qcow2,cache.no-flush=on,file.driver=file,file.filename={self.root}",
            "-device", "nvme,drive=root,serial=root",
            "-serial", f"file:{where}/console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={where}/agent,server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=agent",
        ]  # fmt: skip
        return command + [argument for disk in self.disks for argument in disk.arguments()]

    def _connect(self, deadline_s: float) -> socket.socket:
        while True:
            self._check(deadline_s)
            link = socket.socket(socket.AF_UNIX)
            try:
                link.connect(f"{self._directory}/agent")
            except OSError:
                link.close()
                time.sleep(0.02)
            else:
                return link

    def _check(self, deadline_s: float) -> None:
        """Raise if QEMU has ended or the time is over."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            stderr = (self._directory / "stderr").read_text(errors="replace")
            raise MachineError(f"QEMU ended with {code}: {stderr[-1000:]}\n{self.console()[-2000:]}")
        if time.monotonic() > deadline_s:
            raise MachineError(f"no answer in time\n{self.console()[-3000:]}")

    def _answer(self, number: int, deadline_s: float) -> dict[str, Any]:
        """Return the answer of this number, keeping others for those who wait for them."""
        assert self._socket is not None
        while number not in self._answers:
            self._check(deadline_s)
            if not select.select([self._socket], [], [], 0.2)[0]:
                continue
            with contextlib.suppress(ConnectionResetError):  # QEMU has just ended: the check above says how
                self._buffer += self._socket.recv(1 << 20)
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                message = json.loads(line)
                self._answers[message["id"]] = message
        answer = self._answers.pop(number)
        if "error" in answer:
            raise MachineError(answer["error"])
        return answer

    def _send(self, **request: object) -> int:
        assert self._socket is not None
        self._number += 1
        self._socket.sendall(json.dumps({"id": self._number, **request}).encode() + b"\n")
        return self._number

    def console(self) -> str:
        """Return what the kernel and systemd wrote to the serial console of this boot."""
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / "console").read_text(errors="replace")
        return ""

    def begin(
        self,
        argv: Sequence[str],
        *,
        user: str = "",
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 300,
    ) -> int:
        """Start a command as root, or as ``user`` with its groups, and return its number for finish()."""
        data = base64.b64encode(stdin).decode()
        return self._send(argv=list(argv), user=user, stdin=data, env=dict(environment or {}), timeout_s=timeout_s)

    def finish(self, number: int, *, check: bool = True, timeout_s: float = 300) -> Result:
        """Wait for a command that was begun.

        Raises: MachineError, also if the command fails, unless ``check`` is false.
        """
        begin_s = time.monotonic()
        answer = self._answer(number, begin_s + timeout_s + 30)
        out, err = (base64.b64decode(answer[name]).decode(errors="replace") for name in ("out", "err"))
        if answer["code"] is None:
            raise MachineError(f"the command did not end in {timeout_s} s\n{self.console()[-3000:]}")
        if check and answer["code"]:
            raise MachineError(f"the command ended with {answer['code']}\n{out[-4000:]}\n{err[-4000:]}")
        return Result(answer["code"], out, err, time.monotonic() - begin_s)

    def run(
        self,
        *argv: str,
        user: str = "",
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 300,
    ) -> Result:
        """Run a command and wait for it. Raises: MachineError as finish() does."""
        number = self.begin(argv, user=user, stdin=stdin, environment=environment, timeout_s=timeout_s)
        try:
            return self.finish(number, check=check, timeout_s=timeout_s)
        except MachineError as error:
            raise MachineError(f"{' '.join(argv)[:300]}: {error}") from None

    def sh(self, script: str, *, user: str = "", check: bool = True, timeout_s: float = 300) -> Result:
        """Run a shell script that stops at its first failure."""
        return self.run("/bin/bash", "-euc", script, user=user, check=check, timeout_s=timeout_s)

    def start(self, *argv: str, environment: Mapping[str, str] | None = None) -> int:
        """Start a program that answers each line with a line, as root; return its number for tell()."""
        number = self._send(start=argv, env=dict(environment or {}))
        self._answer(number, time.monotonic() + 60)
        return number

    def tell(self, program: int, line: str, timeout_s: float) -> str:
        """Give such a program a line and return its answer. Raises: MachineError, also if the program has ended."""
        answer = str(self._answer(self._send(tell=program, line=line), time.monotonic() + timeout_s)["line"])
        if not answer:
            raise MachineError(f"the program has ended\n{self.console()[-3000:]}")
        return answer

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file of the guest, making the directories above it."""
        for offset in range(0, max(len(data), 1), CHUNK_BYTES):
            piece = base64.b64encode(data[offset : offset + CHUNK_BYTES]).decode()
            number = self._send(put=path, data=piece, append=offset > 0, mode=mode)
            self._answer(number, time.monotonic() + 60)

    def get(self, path: str) -> bytes:
        """Read a file of the guest."""
        data = b""
        while True:
            number = self._send(get=path, offset=len(data), length=CHUNK_BYTES)
            piece = base64.b64decode(self._answer(number, time.monotonic() + 60)["data"])
            if not piece:
                return data
            data += piece

    def wait_until_up(self) -> None:
        """Wait until systemd has started all that a boot starts; the agent answers long before."""
        self.run("systemctl", "is-system-running", "--wait", check=False)

    def shut_down(self, how: str, timeout_s: float = 600) -> None:
        """Shut down as an administrator does, so that every disk is clean. Raises: MachineError."""
        assert self._process is not None
        self.begin(["systemctl", how])
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise MachineError(f"no {how} in {timeout_s} s\n{self.console()[-3000:]}") from None
        finally:
            self.kill()

    def reboot(self) -> None:
        """Have systemd reboot, and boot from the same disks; QEMU itself ends at a reset (-no-reboot)."""
        self.shut_down("reboot")
        self.boot()

    def kill(self) -> None:
        """End QEMU at once: memory and everything not yet written by the guest's kernel is lost."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        self.last_console = self.console()
        if self._socket:
            self._socket.close()
        self._socket = None
        shutil.rmtree(self._directory)


_ACCELERATORS: Final = {"kvm": "kvm", "tcg": "tcg,thread=multi"}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def choose_accelerator(rootfs: Rootfs) -> str:
    """Return "kvm" if a guest boots under it within KVM_TRIAL_S, else "tcg", and say which and why on stderr.

    /dev/kvm alone proves nothing: on some clouds it opens and then hangs every stock kernel. The finding is kept until
    the host boots again. IMGPULL_VM_ACCEL=kvm or tcg overrides it.
    """
    chosen = os.environ.get("IMGPULL_VM_ACCEL")
    if chosen:
        if chosen not in _ACCELERATORS:
            raise MachineError(f"IMGPULL_VM_ACCEL: expected one of {', '.join(_ACCELERATORS)}, got {chosen}")
        return chosen
    host_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    note = cache_directory() / "accelerator.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(note.read_text())
        if known["host_boot"] == host_boot:
            return str(known["accelerator"])
    accelerator, reason = _try_kvm(rootfs)
    print(f"tests/vm: {accelerator}: {reason}", file=sys.stderr, flush=True)
    fresh = note.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"host_boot": host_boot, "accelerator": accelerator, "reason": reason}) + "\n")
    fresh.rename(note)
    return accelerator


def _try_kvm(rootfs: Rootfs) -> tuple[str, str]:
    if platform.machine() != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg", "this host has no usable /dev/kvm, the machine is emulated"
    with temporary_directory() as directory:
        root = overlay(rootfs.image, directory / "root.qcow2")
        trial = Machine(rootfs.kernel, root, accelerator="kvm", boot_timeout_s=KVM_TRIAL_S, boot_attempts=1)
        try:
            with trial:
                return "kvm", f"a guest answered after {trial.boot_s:.1f} s"
        except MachineError as error:
            return "tcg", f"/dev/kvm is there but no guest booted with it in {KVM_TRIAL_S:.0f} s ({_last_line(error)})"


def _last_line(error: MachineError) -> str:
    return next(reversed([line for line in str(error).splitlines() if line.strip()]), "silent")[:200]


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a directory for overlays and disks on a real filesystem: /tmp may be memory."""
    directory = Path(tempfile.mkdtemp(prefix="imgpull-vm-", dir="/var/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
