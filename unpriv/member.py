"""What one member means: from the fields of its headers to a checked Member.

Rule 1: a PAX record and the header that it overrides may not contradict each other where the header could say it.
Rule 2: what honest images carry and we do not keep is counted; what we change is reported; the rest is refused.
"""

from typing import Final, NamedTuple

from privhelper.protocol import MAX_ID, MAX_MTIME_NS, MIN_MTIME_NS
from unpriv import rules
from unpriv.findings import Findings
from unpriv.header import BLOCK_BYTES, Header
from unpriv.limits import Limits
from unpriv.pax import Overrides
from unpriv.rulebook import RejectedError, rule
from unpriv.rules import BLOCK, CHAR, DIRECTORY, FIFO, HARDLINK, SYMLINK

PAX_CONFLICT: Final = rule("pax_conflict")
ROOT_NOT_DIRECTORY: Final = rule("root_not_directory")
TRAILING_SLASH: Final = rule("trailing_slash")
NAMES_ONLY_LINK: Final = rule("names_only_link")
DEVICE_REFUSED: Final = rule("device_refused")
FIFO_REFUSED: Final = rule("fifo_refused")
WHITEOUT_DEVICE: Final = rule("whiteout_device")
HARDLINK_TARGET_MISSING: Final = rule("hardlink_target_missing")
HARDLINK_ESCAPES_ROOT: Final = rule("hardlink_escapes_root")
HARDLINK_METADATA_DROPPED: Final = rule("hardlink_metadata_dropped", "drop")
MODE_BITS_DROPPED: Final = rule("mode_bits_dropped", "drop")
MTIME_CLAMPED: Final = rule("mtime_clamped", "warn")
ID_ABOVE_HELPER: Final = rule("id_above_helper", "warn")
CAPABILITY_ABOVE_HELPER: Final = rule("capability_above_helper", "warn")

_NS: Final = 1_000_000_000
_new: Final = tuple.__new__  # see header.py
_MAX_OCTAL_ID: Final = 0o7777777  # seven digits


class Member(NamedTuple):
    """One checked member. ``path`` is relative to the layer's root, b"" is the root itself."""

    number: int
    offset: int  # of its own header
    kind: int
    path: bytes
    target: bytes  # of a symbolic link as it stands, of a hard link relative to the root
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    at: int  # offset of its data
    xattrs: dict[bytes, bytes]


class Judge:
    """The rules about single members, with the limits and the findings of one check."""

    def __init__(self, limits: Limits, findings: Findings):
        """Judge members of one archive."""
        self._limits = limits
        self._findings = findings
        self._plain_id = min(MAX_ID, limits.archive.max_id)  # up to here there is nothing to say

    def judge(
        self,
        fields: Header,
        overrides: Overrides | None,
        kind: int,
        untrusted_name: bytes,
        untrusted_target: bytes,
        size: int,
        place: tuple[int, int],
    ) -> Member:
        """Return the checked form of a member that is number and offset ``place`` of its archive.

        Raises:
            RejectedError: a rule about names, owners, modes, attributes or types.
        """
        path = rules.checked_path(untrusted_name, self._limits)
        if not path and kind != DIRECTORY:
            raise RejectedError(ROOT_NOT_DIRECTORY, f"the root as a {rules.TYPE_NAMES[kind]}")
        if kind not in (DIRECTORY, SYMLINK) and untrusted_name[-1:] == b"/":
            raise RejectedError(TRAILING_SLASH, f"a {rules.TYPE_NAMES[kind]} whose name ends with a slash")
        target = self._target(kind, untrusted_target) if untrusted_target or kind in (SYMLINK, HARDLINK) else b""
        mode = rules.checked_mode(fields.mode, kind)
        if fields.mode > rules.MODE_BITS:
            self._findings.dropped[MODE_BITS_DROPPED] += 1
        uid, gid, mtime_ns = fields.uid, fields.gid, fields.mtime * _NS
        xattrs: dict[bytes, bytes] = {}
        if overrides is not None:
            uid = _owner(uid, overrides.uid, "uid")
            gid = _owner(gid, overrides.gid, "gid")
            mtime_ns = mtime_ns if overrides.mtime_ns is None else overrides.mtime_ns
            self._findings.dropped.update(overrides.dropped)
            if overrides.xattrs:
                xattrs = self._xattrs(overrides.xattrs, kind, path, place)
        if uid > self._plain_id or gid > self._plain_id:
            self._large_owner(uid, gid, path, place)
        if not MIN_MTIME_NS <= mtime_ns <= MAX_MTIME_NS:
            mtime_ns = self._clamp(mtime_ns, path, place)
        if kind in (CHAR, BLOCK, FIFO):
            self._special(kind, path, fields)
        number, offset = place
        at = offset + BLOCK_BYTES
        return _new(Member, (number, offset, kind, path, target, mode, uid, gid, mtime_ns, size, at, xattrs))

    def _target(self, kind: int, untrusted_target: bytes) -> bytes:
        if kind == SYMLINK:
            rules.symlink_target_invalid(untrusted_target, self._limits.names.link_target_bytes)
            return untrusted_target
        if kind != HARDLINK:
            if untrusted_target:
                raise RejectedError(NAMES_ONLY_LINK, f"a {rules.TYPE_NAMES[kind]} with a link target")
            return b""
        if not untrusted_target:
            raise RejectedError(HARDLINK_TARGET_MISSING, "a hard link without a target")
        if b".." in untrusted_target.split(b"/"):
            raise RejectedError(HARDLINK_ESCAPES_ROOT, "path traversal: the target of a hard link has a `..`")
        return rules.checked_path(untrusted_target, self._limits)

    def _xattrs(
        self, untrusted_xattrs: dict[bytes, bytes], kind: int, path: bytes, place: tuple[int, int]
    ) -> dict[bytes, bytes]:
        """Return what is kept of a member's attributes; count what honest images carry and we do not keep."""
        kept = {}
        for name, value in untrusted_xattrs.items():
            if dropped := rules.dropped_xattr(name):
                self._findings.dropped[dropped] += 1
                continue
            rules.xattr_not_allowed(name, self._limits)
            rules.xattr_on_link(kind)
            if kind == HARDLINK:
                self._findings.dropped[HARDLINK_METADATA_DROPPED] += 1
                continue
            if name == rules.CAPABILITY:
                rules.capability_invalid(value, kind)
                if len(value) != rules.CAPABILITY_2_BYTES:
                    reason = "a capability of revision 3: a commit will be refused, the helper keeps revision 2"
                    self._findings.warn(RejectedError(CAPABILITY_ABOVE_HELPER, reason, path, *place))
            kept[name] = value
        if kept:
            rules.xattr_too_large(kept, self._limits)
        return kept

    def _large_owner(self, uid: int, gid: int, path: bytes, place: tuple[int, int]) -> None:
        """Refuse what no system keeps; say what our own helper cannot keep."""
        for value, which in ((uid, "uid"), (gid, "gid")):
            rules.id_out_of_range(value, which, self._limits.archive.max_id)
            if value > MAX_ID:
                reason = f"{which} {value}: a commit will be refused, the helper keeps ids up to {MAX_ID}"
                self._findings.warn(RejectedError(ID_ABOVE_HELPER, reason, path, *place))

    def _clamp(self, mtime_ns: int, path: bytes, place: tuple[int, int]) -> int:
        kept = MIN_MTIME_NS if mtime_ns < 0 else MAX_MTIME_NS
        reason = f"modification time {mtime_ns // _NS} s, kept as {kept // _NS} s"
        self._findings.warn(RejectedError(MTIME_CLAMPED, reason, path, *place))
        return kept

    def _special(self, kind: int, path: bytes, fields: Header) -> None:
        """Refuse or omit a device node or a pipe, as the policy says."""
        if kind == CHAR and fields.major == fields.minor == 0:
            raise RejectedError(WHITEOUT_DEVICE, "character device 0:0, overlayfs's mark of a deletion")
        special = self._limits.special
        policy = {CHAR: special.char, BLOCK: special.block, FIFO: special.fifo}[kind]
        if policy == "refuse":
            which = FIFO_REFUSED if kind == FIFO else DEVICE_REFUSED
            shown = "" if kind == FIFO else f" {fields.major}:{fields.minor}"
            raise RejectedError(which, f"{rules.TYPE_NAMES[kind]}{shown}; the policy may omit it instead")
        self._findings.omit(path, rules.TYPE_NAMES[kind])


def _owner(field: int, claimed: int | None, which: str) -> int:
    """Return the owner that PAX record and header agree on; a header that cannot hold it may say anything."""
    if claimed is None:
        return field
    if claimed != field and claimed <= _MAX_OCTAL_ID:
        raise RejectedError(PAX_CONFLICT, f"PAX {which} {claimed}, header {which} {field}")
    return claimed
