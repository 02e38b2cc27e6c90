"""Call functions in children of a process that has loaded their modules: an emulated processor needs seconds to import.

  warm.py MODULE...     import these; then read a JSON object a line: {"call": "module:function", "words": [...],
                        "user": name or "", "environment": {...}, "timeout_s": n}; answer each with one: {"code": exit
                        code or signal, "out": ..., "err": ..., "kernel": what it has said meanwhile}

Rule 1: each call is a process of its own, forked from one in which nothing was ever called.
Rule 2: it is started as the agent starts a command: environment, folder, user, session and standard descriptors.
Rule 3: past its time its session is killed, and ``code`` is null.
"""

import contextlib
import importlib
import json
import os
import pwd
import select
import signal
import sys
import tempfile
import traceback
from typing import IO, Any

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def become(request: dict[str, Any], files: list[IO[bytes]]) -> None:
    """Make this process what a command of this user's would be."""
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    os.closerange(3, 64)
    entry = pwd.getpwnam(request["user"] or "root")
    home = {"PATH": PATH, "HOME": entry.pw_dir, "LC_ALL": "C.UTF-8"}
    os.environ.clear()
    os.environ.update(home | request["environment"])
    if request["user"]:
        os.initgroups(request["user"], entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)


def run(request: dict[str, Any]) -> None:
    """Call the function, as the main function of a program, and end with its exit code: never returns."""
    code: object = 1
    try:
        module, _, function = request["call"].partition(":")
        sys.argv[:] = [module, *request["words"]]
        code = getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def call(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, call, wait."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            become(request, [out, err])
            run(request)
        code = wait(pid, request["timeout_s"])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {"code": code, "out": texts[0], "err": texts[1]}


def wait(pid: int, timeout_s: float) -> int | None:
    """Return how a child ended, or None if it had to be killed; who hangs in the kernel is not waited for."""
    handle = os.pidfd_open(pid)
    try:
        if select.select([handle], [], [], timeout_s)[0]:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return None
    finally:
        os.close(handle)


def news(kernel: int) -> str:
    """Return what the kernel has said since this was last asked (/dev/kmsg: a message a read)."""
    said = ""
    while True:
        try:
            said += os.read(kernel, 8192).decode(errors="replace")
        except BlockingIOError:
            return said
        except BrokenPipeError:  # the oldest were overwritten
            continue


def main() -> None:
    """Serve until the machine ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    kernel = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    for line in sys.stdin:
        reply = call(json.loads(line))
        print(json.dumps({**reply, "kernel": news(kernel)}), flush=True)


if __name__ == "__main__":
    main()
