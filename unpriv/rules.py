"""What a member of an archive may say: one rule a function, raising its own name.

Rule 1: a function either returns the value in its checked form or raises RejectedError; it never returns a verdict.
Rule 2: nothing here knows about bytes of the archive or other members; those rules are in reader.py and tree.py.
"""

import struct
from typing import Final

from unpriv.limits import Limits
from unpriv.rulebook import RejectedError, rule

PATH_EMPTY: Final = rule("path_empty")
PATH_ESCAPES_ROOT: Final = rule("path_escapes_root")
PATH_TOO_LONG: Final = rule("path_too_long")
PATH_TOO_DEEP: Final = rule("path_too_deep")
PATH_HAS_NUL: Final = rule("path_has_nul")
COMPONENT_TOO_LONG: Final = rule("component_too_long")
SYMLINK_TARGET_INVALID: Final = rule("symlink_target_invalid")
ID_OUT_OF_RANGE: Final = rule("id_out_of_range")
MODE_INVALID: Final = rule("mode_invalid")
MODE_TYPE_CONFLICT: Final = rule("mode_type_conflict")
XATTR_NOT_ALLOWED: Final = rule("xattr_not_allowed")
XATTR_TOO_LARGE: Final = rule("xattr_too_large")
XATTR_ON_LINK: Final = rule("xattr_on_link")
CAPABILITY_INVALID: Final = rule("capability_invalid")
XATTR_DROPPED: Final = rule("xattr_dropped", "drop")
ACL_DROPPED: Final = rule("acl_dropped", "drop")

# Types of members, as the rest of the program names them.
FILE, DIRECTORY, SYMLINK, HARDLINK, CHAR, BLOCK, FIFO = range(7)
TYPE_NAMES: Final = ("file", "dir", "symlink", "hardlink", "char", "block", "fifo")

MODE_FIELD: Final = 0o7777777  # what the seven digits of a header hold
MODE_BITS: Final = 0o177777  # type and permissions, inode(7)
_IFMT: Final = 0o170000
_IFMT_OF: Final = {
    FILE: 0o100000,
    DIRECTORY: 0o040000,
    SYMLINK: 0o120000,
    HARDLINK: 0o100000,
    CHAR: 0o020000,
    BLOCK: 0o060000,
    FIFO: 0o010000,
}

CAPABILITY: Final = b"security.capability"
CAPABILITY_2_BYTES: Final = 20  # linux/capability.h, revision 2
# Attributes of the host that built the image. xattr(7); selinux(8); Linux Documentation/security.
_DROPPED_XATTRS: Final = (
    b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor", b"security.SMACK64",
    b"system.", b"com.apple.",
)  # fmt: skip
_ACL_XATTRS: Final = (b"system.posix_acl_access", b"system.posix_acl_default", b"system.nfs4_acl", b"system.richacl")
# overlayfs mounted with `userxattr` obeys these (Linux Documentation/filesystems/overlayfs.rst).
_REFUSED_USER_XATTRS: Final = (b"user.overlay.",)


def checked_path(untrusted_path: bytes, limits: Limits) -> bytes:
    """Return a name relative to the layer's root: no empty or `.` components, no slash at either end; b"" is the root.

    A leading `/` and `./` mean the root, as every unpacker of layers reads them.
    """
    names = limits.names
    plain = untrusted_path[2:] if untrusted_path[:2] == b"./" else untrusted_path
    plain = plain[:-1] if plain[-1:] == b"/" else plain
    # Nearly every name is plain and short: then no component can be `.`, `..`, empty or too long.
    if (
        plain
        and plain[0] not in b"./"
        and b"/." not in plain
        and b"//" not in plain
        and len(plain) <= names.component_bytes
        and b"\0" not in plain
        and plain.count(b"/") < names.depth
        and plain[-1] != 0x2F
    ):
        return plain
    if not untrusted_path:
        raise RejectedError(PATH_EMPTY, "the member has no name")
    path_has_nul(untrusted_path)
    components = [c for c in untrusted_path.split(b"/") if c not in (b"", b".")]
    path_escapes_root(components)
    component_too_long(components, names.component_bytes)
    path_too_deep(components, names.depth)
    path = b"/".join(components)
    path_too_long(path, names.path_bytes)
    return path


def path_has_nul(path: bytes) -> None:
    """Refuse a NUL, at which the kernel would end the name."""
    if b"\0" in path:
        raise RejectedError(PATH_HAS_NUL, f"NUL at byte {path.index(0)}", path)


def path_escapes_root(components: list[bytes]) -> None:
    """Refuse any `..`, also one that would stay inside."""
    if b".." in components:
        raise RejectedError(PATH_ESCAPES_ROOT, "path traversal: a component is `..`")


def component_too_long(components: list[bytes], limit: int) -> None:
    """Refuse a component that no file system holds."""
    longest = max(map(len, components), default=0)
    if longest > limit:
        raise RejectedError(COMPONENT_TOO_LONG, f"a component has {longest} bytes, limit {limit}")


def path_too_deep(components: list[bytes], limit: int) -> None:
    """Refuse a name of too many components."""
    if len(components) > limit:
        raise RejectedError(PATH_TOO_DEEP, f"{len(components)} components, limit {limit}")


def path_too_long(path: bytes, limit: int) -> None:
    """Refuse a name that no system call takes."""
    if len(path) > limit:
        raise RejectedError(PATH_TOO_LONG, f"{len(path)} bytes, limit {limit}")


def symlink_target_invalid(target: bytes, limit: int) -> None:
    """Refuse a target that symlink(2) refuses. What it says is nobody's business here: it is never followed."""
    if not 1 <= len(target) <= limit:
        raise RejectedError(SYMLINK_TARGET_INVALID, f"the target has {len(target)} bytes, expected 1 to {limit}")
    if b"\0" in target:
        raise RejectedError(PATH_HAS_NUL, "NUL in the link target")


def id_out_of_range(value: int, which: str, limit: int) -> None:
    """Refuse an owner that chown(2) takes for `leave unchanged` or that is cut to another id."""
    if value > limit:
        raise RejectedError(ID_OUT_OF_RANGE, f"{which} {value}, at most {limit}")


def checked_mode(mode: int, kind: int) -> int:
    """Return the permission bits; type bits must be absent or agree with the member's type (old Docker writes them).

    Bits above both mean nothing to any unpacker, and are left out.
    """
    if mode > MODE_FIELD:
        raise RejectedError(MODE_INVALID, f"mode {mode:o} has more bits than seven octal digits")
    found = mode & _IFMT
    if found and found != _IFMT_OF[kind]:
        raise RejectedError(MODE_TYPE_CONFLICT, f"mode {mode:o} contradicts the type {TYPE_NAMES[kind]}")
    return mode & 0o7777


def dropped_xattr(name: bytes) -> str | None:
    """Return the rule by which an attribute of honest images is left out and counted, or None."""
    if name.startswith(_ACL_XATTRS):
        return ACL_DROPPED
    return XATTR_DROPPED if name.startswith(_DROPPED_XATTRS) else None


def xattr_not_allowed(name: bytes, limits: Limits) -> None:
    """Refuse every name but security.capability and user.*."""
    if len(name) > limits.xattrs.name_bytes or b"\0" in name:
        raise RejectedError(XATTR_NOT_ALLOWED, f"an attribute's name has {len(name)} bytes or a NUL")
    if name == CAPABILITY:
        return
    if not name.startswith(b"user.") or name == b"user." or name.startswith(_REFUSED_USER_XATTRS):
        shown = name.decode("utf-8", "backslashreplace")
        raise RejectedError(XATTR_NOT_ALLOWED, f"the attribute {shown!r} is not allowed")


def xattr_too_large(xattrs: dict[bytes, bytes], limits: Limits) -> None:
    """Refuse what one ext4 block cannot hold (a header, then 16 bytes, name and value of each, padded to 4)."""
    if len(xattrs) > limits.xattrs.count:
        raise RejectedError(XATTR_TOO_LARGE, f"{len(xattrs)} attributes, limit {limits.xattrs.count}")
    longest = max(map(len, xattrs.values()))
    if longest > limits.xattrs.value_bytes:
        raise RejectedError(XATTR_TOO_LARGE, f"a value of {longest} bytes, limit {limits.xattrs.value_bytes}")
    total = sum(16 + (len(name) + 3 & ~3) + (len(value) + 3 & ~3) for name, value in xattrs.items())
    if total > limits.xattrs.entry_bytes:
        raise RejectedError(XATTR_TOO_LARGE, f"{total} bytes of attributes, limit {limits.xattrs.entry_bytes}")


def xattr_on_link(kind: int) -> None:
    """Refuse attributes on a symbolic link: the kernel has no user.* there, and a capability would be the target's."""
    if kind == SYMLINK:
        raise RejectedError(XATTR_ON_LINK, "extended attributes on a symbolic link")


def capability_invalid(value: bytes, kind: int) -> None:
    """Refuse a capability that the kernel does not take (linux/capability.h: revision 2, 20 bytes, and 3, 24 bytes)."""
    if kind != FILE:
        raise RejectedError(CAPABILITY_INVALID, f"a file capability on a {TYPE_NAMES[kind]}")
    revision = struct.unpack("<I", value[:4])[0] & 0xFF000000 if len(value) >= 4 else 0
    if (revision, len(value)) not in ((0x02000000, CAPABILITY_2_BYTES), (0x03000000, 24)):
        raise RejectedError(CAPABILITY_INVALID, f"{len(value)} bytes of revision {revision >> 24}")
