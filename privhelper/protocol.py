"""What may be asked of the root helper, what it answers, and the ceilings that no policy can loosen. PUBLIC.

Rule 1: one SOCK_SEQPACKET message is one JSON object of at most MAX_MESSAGE bytes with exactly the fields of its row.
Rule 2: no field names a path, a device or a number of the host; the longest free text is the name of an activation.
Rule 3: whoever receives a message that breaks this page hangs up; there is nothing to negotiate.

Which request is permitted when, and with which descriptors, is policy/protocol.toml; what a layer manifest may say is
bounded by the ceilings below for both sides of the privilege boundary.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Final

VERSION: Final = 1
MAX_MESSAGE: Final = 65_536  # bytes; the default socket buffer takes three of them (unix(7), socket(7))

# ---------------------------------------------------------------- ceilings of the manifest

FORMAT: Final = "imgpull.layer/1"
MAX_LINE_BYTES: Final = 65_536  # one operation with its newline
MAX_NAME_BYTES: Final = 255  # NAME_MAX
MAX_PATH_BYTES: Final = 4_096  # PATH_MAX, of the path of an entry from the layer's root
MAX_DEPTH: Final = 1_024  # components; policy keeps it far lower
MAX_TARGET_BYTES: Final = 4_095  # symlink(7): PATH_MAX without its NUL
MAX_MODE: Final = 0o7777
# Root writes a layer inside a user namespace that maps these ids to 2147483648 and up, above every id of the host. The
# 32 bits leave room for this many; (uid_t) -1 stays invalid. See policy/decisions/populate-user-namespace.md.
MAX_ID: Final = 2_147_483_645
MIN_HOST_ID: Final = 2_147_483_648
MAX_FILE_BYTES: Final = 1 << 44  # 16 TiB: ext4 with 4 KiB blocks
MIN_MTIME_NS: Final = -(1 << 31) * 1_000_000_000  # ext4, 256-byte inodes: 34 bits of seconds from here
MAX_MTIME_NS: Final = 15_032_385_535 * 1_000_000_000
MAX_XATTR_NAME_BYTES: Final = 255  # xattr(7)
MAX_XATTR_VALUE_BYTES: Final = 4_096  # one ext4 block
MAX_XATTRS: Final = 64  # of one entry
XATTR_CAPABILITY: Final = "security.capability"  # the one name allowed outside XATTR_PREFIX
XATTR_PREFIX: Final = "user."
MAX_DEVICE_NUMBER: Final = 1 << 20
MAX_ENTRIES: Final = 1 << 30
MAX_MANIFEST_BYTES: Final = 1 << 34
MAX_PAYLOAD_BYTES: Final = 1 << 50
MAX_CONTENT_BYTES: Final = 1 << 50
MAX_DEVICE_BYTES: Final = 1 << 50

# ---------------------------------------------------------------- replies

# What an error means, and the exit code (sysexits.h) that the command line turns it into.
EXIT_CODES: Final = {
    "rejected": 65,  # the manifest or the payload is wrong
    "not_found": 66,
    "pool": 69,  # missing, read-only, failed or in need of a check; the message says the way out
    "no_room": 73,  # nothing was written; figures say what was asked and what there is
    "fault": 74,  # input/output error; what was being written is gone
    "busy": 75,  # somebody holds it open; try again
    "in_use": 75,  # children or activations stand on it
    "version": 76,
    "refused": 77,  # policy: quota, somebody else's, not allowed
}

Message = dict[str, Any]


class ProtocolError(Exception):
    """The other side broke this page: hang up."""


# ---------------------------------------------------------------- requests

_LAYER: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
Check = Callable[[object], bool]


def _is_layer(value: object) -> bool:
    return isinstance(value, str) and _LAYER.fullmatch(value) is not None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_mode(value: object) -> bool:
    return value in ("ro", "rw")


def _count_to(ceiling: int) -> Check:
    return lambda value: type(value) is int and 0 <= value <= ceiling


REQUESTS: Final[dict[str, dict[str, Check]]] = {
    "hello": {"version": _count_to(1 << 31)},
    "stat": {"layer": _is_layer},
    "manifest": {"layer": _is_layer},
    "commit": {"manifest_bytes": _count_to(MAX_MANIFEST_BYTES), "payload_bytes": _count_to(MAX_PAYLOAD_BYTES)},
    "activate": {"layer": _is_layer, "name": _is_name, "mode": _is_mode, "size": _count_to(MAX_DEVICE_BYTES)},
    "deactivate": {"name": _is_name},
    "remove": {"layer": _is_layer},
    "list": {},
    "verify": {"layer": _is_layer},
    "reconcile": {},
}


def encode(message: Message) -> bytes:
    """Return the bytes of one message.

    Raises:
        ProtocolError: it is longer than MAX_MESSAGE.
    """
    data = json.dumps(message, separators=(",", ":"), sort_keys=True).encode("ascii")
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"message of {len(data)} bytes, ceiling {MAX_MESSAGE}")
    return data


def decode(untrusted_data: bytes) -> Message:
    """Return the one JSON object in a message: ASCII, no duplicate keys, no floating point.

    Raises:
        ProtocolError: it is anything else.
    """
    if len(untrusted_data) > MAX_MESSAGE:
        raise ProtocolError(f"message of {len(untrusted_data)} bytes, ceiling {MAX_MESSAGE}")
    try:
        value = json.loads(
            untrusted_data.decode("ascii"),
            object_pairs_hook=_unique,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not one JSON object: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise ProtocolError("not one JSON object")
    return value


def parse_request(untrusted_data: bytes) -> tuple[str, Message]:
    """Return the name of a request and its fields, each within its bounds.

    Raises:
        ProtocolError: unknown request, missing, unknown or wrong field.
    """
    message = decode(untrusted_data)
    op = message.pop("op", None)
    fields = REQUESTS.get(op) if isinstance(op, str) else None
    if fields is None:
        raise ProtocolError("unknown request")
    if message.keys() != fields.keys():
        raise ProtocolError(f"{op}: fields are not {sorted(fields)}")
    for name, is_valid in fields.items():
        if not is_valid(message[name]):
            raise ProtocolError(f"{op}: bad {name}")
    return str(op), message


def _unique(pairs: list[tuple[str, object]]) -> Message:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _no_float(text: str) -> float:
    raise ValueError(f"not an integer: {text[:16]}")
