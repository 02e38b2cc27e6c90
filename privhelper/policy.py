"""Load what was granted. policy/ is the only place where a limit, a grant or a system call is named.

Rule 1: what is not in these files is not granted; a file that does not read as it should stops the helper (exit 78).
Rule 2: the administrator's file changes values, never adds keys, and counts only when no one but root can write it.
"""

import hashlib
import os
import stat
import tomllib
from typing import Any, Final, NamedTuple

from privhelper import protocol, seccomp

ADMINISTRATORS_FILE: Final = "/etc/imgpull/helper.toml"
_TABLES: Final = ("helper.toml", "protocol.toml", "authority.toml")
_CHILDREN: Final = ("populate", "verify")  # the roles of authority.toml that root starts
_CEILINGS: Final = {
    "manifest_bytes": protocol.MAX_MANIFEST_BYTES, "payload_bytes": protocol.MAX_PAYLOAD_BYTES,
    "content_bytes": protocol.MAX_CONTENT_BYTES, "entries": protocol.MAX_ENTRIES, "depth": protocol.MAX_DEPTH,
    "device_bytes": protocol.MAX_DEVICE_BYTES,
}  # fmt: skip
_FOLDER: Final = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "policy")


class PolicyError(Exception):
    """A policy file is not what it should be (EX_CONFIG)."""


class Policy(NamedTuple):
    """The grants in force."""

    settings: dict[str, Any]  # helper.toml with the administrator's overrides
    requests: dict[str, dict[str, Any]]  # protocol.toml, by name of the request
    authority: dict[str, dict[str, Any]]  # authority.toml
    filters: dict[str, bytes]  # seccomp programs, by role
    digest: str  # sha256 of all texts in force


def load(override: str | None) -> Policy:
    """Read the built-in files and, where there is one, the administrator's.

    Raises:
        PolicyError: a file is missing, malformed, or writable by others; the message names it.
    """
    texts = {name: builtin(name) for name in _TABLES}
    settings, requests, authority = (_parse(name, texts[name]) for name in _TABLES)
    texts["syscalls/numbers.txt"] = builtin("syscalls/numbers.txt")
    known = seccomp.numbers(texts["syscalls/numbers.txt"].decode("ascii"))
    filters = {}
    for role in _CHILDREN:
        name = f"syscalls/{authority[role]['syscalls']}.seccomp"
        texts[name] = builtin(name)
        try:
            filters[role] = seccomp.program(texts[name].decode("ascii"), known)
        except ValueError as error:
            raise PolicyError(f"policy/{name}: {error}") from error
    if override is None and os.path.exists(ADMINISTRATORS_FILE):
        override = ADMINISTRATORS_FILE
    if override is not None:
        texts["override"] = _administrators(override)
        _merge(settings, _parse(override, texts["override"]), override)
    _check_ceilings(settings)
    if settings["store"] not in ("reflink", "thin"):
        raise PolicyError(f"store: {settings['store']!r} is neither reflink nor thin")
    return Policy(settings, {row["name"]: row for row in requests["request"]}, authority, filters, _digest(texts))


def _check_ceilings(settings: dict[str, Any]) -> None:
    """Make sure that no limit is looser than the protocol, and that no id of an image is one that the host may use."""
    for name, ceiling in _CEILINGS.items():
        if not 0 <= settings["limits"][name] <= ceiling:
            raise PolicyError(f"limits: {name} is not between 0 and {ceiling}")
    first, count = settings["populate"]["first_host_id"], settings["populate"]["id_count"]
    if first < protocol.MIN_HOST_ID or count != protocol.MAX_ID + 1 or first + count >= 1 << 32:
        raise PolicyError(f"populate: ids {first} and {count} more are not those that populate may have")


def builtin(name: str) -> bytes:
    """Read one file of policy/, from a source tree, a wheel or a zipapp alike."""
    loader: Any = __spec__.loader
    try:
        return bytes(loader.get_data(os.path.join(_FOLDER, name)))
    except OSError as error:
        raise PolicyError(f"policy/{name}: {error}") from error


def _administrators(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PolicyError(f"{path}: must belong to root and be writable by root alone")
            return file.read()
    except OSError as error:
        raise PolicyError(f"{path}: {error}") from error


def _parse(name: str, text: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(text.decode("utf-8"))
    except ValueError as error:
        raise PolicyError(f"{name}: {error}") from error


def _merge(settings: dict[str, Any], changes: dict[str, Any], where: str) -> None:
    for key, value in changes.items():
        if key not in settings:
            raise PolicyError(f"{where}: unknown key {key!r}")
        if type(value) is not type(settings[key]):
            raise PolicyError(f"{where}: {key} is not a {type(settings[key]).__name__}")
        if isinstance(value, dict) and key != "filesystems":
            _merge(settings[key], value, f"{where}: {key}")
        else:
            settings[key] = value


def _digest(texts: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, text in sorted(texts.items()):
        whole.update(f"{name} {len(text)}\n".encode() + text)
    return "sha256:" + whole.hexdigest()
