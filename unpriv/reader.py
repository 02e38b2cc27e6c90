"""The strict reader: the bytes of a tar, chunk by chunk, to its members. It is the source of all that we believe.

Rule 1: every byte of the stream belongs to a header, an extension, a file's data, padding, or the end; what does not
is refused. Padding is not looked at: it is no content and is never copied.
Rule 2: errors of framing end the check, for what follows them cannot be trusted; errors of meaning are findings.
Rule 3: a limit is compared before anything of the size that it bounds is allocated, read or written.

Chunks are whole blocks but for the last one.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from unpriv import header, pax, rules
from unpriv.findings import Findings
from unpriv.header import BLOCK_BYTES, ZERO_BLOCK, Header
from unpriv.limits import Limits
from unpriv.member import Judge, Member
from unpriv.rulebook import RejectedError, rule
from unpriv.rules import BLOCK, CHAR, DIRECTORY, FIFO, FILE, HARDLINK, SYMLINK

ARCHIVE_EMPTY: Final = rule("archive_empty")
ARCHIVE_NOT_TAR: Final = rule("archive_not_tar")
ARCHIVE_TRUNCATED: Final = rule("archive_truncated")
ARCHIVE_END_MISSING: Final = rule("archive_end_missing")
ARCHIVE_TRAILING_DATA: Final = rule("archive_trailing_data")
COMPRESSION_NESTED: Final = rule("compression_nested")
COMPRESSION_UNDECLARED: Final = rule("compression_undeclared")
TYPE_UNKNOWN: Final = rule("type_unknown")
SPARSE_FILE: Final = rule("sparse_file")
SIZE_ON_BODYLESS: Final = rule("size_on_bodyless")
EXTENSION_TOO_LARGE: Final = rule("extension_too_large")
EXTENSION_REPEATED: Final = rule("extension_repeated")
EXTENSION_MIXED: Final = rule("extension_mixed")
EXTENSION_ORPHANED: Final = rule("extension_orphaned")
LONG_NAME_MALFORMED: Final = rule("long_name_malformed")
PAX_CONFLICT: Final = rule("pax_conflict")
ENTRIES_TOO_MANY: Final = rule("entries_too_many")
FILE_TOO_LARGE: Final = rule("file_too_large")

_KINDS: Final = {
    b"0": FILE, b"\0": FILE, b"1": HARDLINK, b"2": SYMLINK, b"3": CHAR, b"4": BLOCK, b"5": DIRECTORY, b"6": FIFO,
}  # fmt: skip
_new: Final = tuple.__new__  # see header.py
_MAX_OCTAL_SIZE: Final = 0o77777777777  # eleven digits: 8 GiB less one byte

# What a stream begins with that is not a tar (file(1)); for the words of the refusal only, nothing is ever tried.
_MAGICS: Final = (
    (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"),
    (b"PK\x03\x04", "zip"), (b"7z\xbc\xaf\x27\x1c", "7-zip"), (b"LRZI", "lrzip"), (b"\x89LZO", "lzop"),
    (b"\x04\x22\x4d\x18", "lz4"), (b"LZIP", "lzip"), (b"\x1f\x9d", "compress"), (b"\xed\xab\xee\xdb", "rpm"),
    (b"GRZipII", "grzip"), (b"\x5d\0\0", "lzma"), (b"!<arch>", "ar"), (b"070701", "cpio"), (b"#mtree", "mtree"),
)  # fmt: skip

_HEADER, _DATA, _EXTENSION, _PADDING, _LAST_ZERO, _END = range(6)


class Claim(NamedTuple):
    """What the other reader must say about a member; raw, as it stands in the archive."""

    start: int  # offset of the first header that belongs to it
    kind: int
    path: bytes
    target: bytes
    size: int
    at: int
    converts: bool  # its names can be converted to text; where not, libarchive warns


# A piece of a file's data within one chunk, to be hashed: the record under which its digest is kept, where it begins
# and ends, whether it is the first and the last piece of its file.
Job = tuple[int, int, int, bool, bool]


class Reader:
    """A parser that is fed the chunks of one archive.

    Members go to ``sink``, which returns the number under which the digest of a file is kept, or -1 for none.
    """

    def __init__(self, limits: Limits, findings: Findings, sink: Callable[[Member], int], compressed: bool):
        """Begin before the first byte."""
        self.entries = 0
        self.claims: deque[Claim] = deque()  # one a member, until the other reader has come to it
        self._limits = limits
        self._max_entries = limits.archive.entries
        self._max_file_bytes = limits.archive.file_bytes
        self._findings = findings
        self._sink = sink
        self._judge = Judge(limits, findings)
        self._compressed = compressed
        self._state = _HEADER
        self._partial = False  # the last chunk ended inside a block
        self._start = -1  # of the member whose headers are being read
        self._extensions = 0
        self._overrides: pax.Overrides | None = None
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._kind_of_extension = b""
        self._body = bytearray()
        self._left = 0  # bytes of data or extension that are still to come
        self._padding = 0
        self._record = -1  # of the file whose data is being read
        self._fresh = False  # none of its data has been seen

    def feed(self, chunk: memoryview, base: int) -> list[Job]:
        """Read a chunk that lies at offset ``base``; return its pieces of file data.

        Raises:
            RejectedError: the archive breaks a rule after which reading cannot go on, or the first one of any kind.
        """
        jobs: list[Job] = []
        position, end = 0, len(chunk)
        while position < end:
            state = self._state
            if state == _HEADER:
                if end - position < BLOCK_BYTES:
                    self._partial = True
                    self._expect_tar(bytes(chunk[position:end]), base + position)
                    break
                block = bytes(chunk[position : position + BLOCK_BYTES])
                position += BLOCK_BYTES
                self._on_block(block, base + position - BLOCK_BYTES)
            elif state == _DATA:
                position = self._on_data(position, end, jobs)
            elif state == _EXTENSION:
                position = self._on_extension(chunk, position, end)
            elif state == _PADDING:
                taken = min(self._padding, end - position)
                self._padding -= taken
                position += taken
                self._state = _PADDING if self._padding else _HEADER
            else:
                position = self._on_end(chunk, position, end, base)
        return jobs

    def finish(self, total: int) -> None:
        """State that the stream has ended after ``total`` bytes."""
        if total == 0:
            raise RejectedError(ARCHIVE_EMPTY, "the stream has no bytes")
        if self._partial or self._state in (_DATA, _EXTENSION, _PADDING):
            raise RejectedError(ARCHIVE_TRUNCATED, "the stream ends inside a member", None, self.entries or None, total)
        if self._state == _HEADER and self._start >= 0:
            raise RejectedError(ARCHIVE_TRUNCATED, "the stream ends behind an extension header", None, None, total)
        if self._state != _END:
            raise RejectedError(ARCHIVE_END_MISSING, "the stream ends without two zero blocks", None, None, total)

    # ---------------------------------------------------------------- between members

    def _on_block(self, block: bytes, offset: int) -> None:
        """Read one header block, or the first block of the end."""
        if block == ZERO_BLOCK:
            if self._extensions_pending():
                raise RejectedError(EXTENSION_ORPHANED, "the archive ends behind it", None, self.entries + 1, offset)
            self._state = _LAST_ZERO
            return
        number = self.entries + 1
        try:
            fields = header.parse(block)
            self._start = offset if self._start < 0 else self._start
            if fields.typeflag in b"xgLK":
                self._begin_extension(fields)
            else:
                self._begin_member(fields, offset)
        except RejectedError as error:
            raise self._beginning(error, block, offset).at(None, number, offset) from None

    def _beginning(self, error: RejectedError, block: bytes, offset: int) -> RejectedError:
        """Return a plainer word for a first block that was never meant to be a header."""
        if offset or block[257:262] == b"ustar" or header.adds_up(block):
            return error
        self._expect_tar(block, offset)
        return RejectedError(ARCHIVE_NOT_TAR, f"the stream does not begin with a header: {error.reason}")

    def _expect_tar(self, beginning: bytes, offset: int) -> None:
        """Refuse by name what begins as another format."""
        for magic, name in _MAGICS:
            if offset == 0 and beginning.startswith(magic):
                which = COMPRESSION_NESTED if self._compressed else COMPRESSION_UNDECLARED
                raise RejectedError(which, f"the stream begins as {name}, expected a tar", None, None, 0)

    def _on_end(self, chunk: memoryview, position: int, end: int, base: int) -> int:
        """Expect zeros: one block of them, then as many as there are."""
        stop = end if self._state == _END else min(end, position + BLOCK_BYTES)
        rest = bytes(chunk[position:stop])
        if rest.strip(b"\0"):
            at = base + position + len(rest) - len(rest.lstrip(b"\0"))
            raise RejectedError(ARCHIVE_TRAILING_DATA, "data behind the end of the archive", None, None, at)
        if stop - position == BLOCK_BYTES:
            self._state = _END
        elif self._state == _LAST_ZERO:
            self._partial = True
        return stop

    # ---------------------------------------------------------------- extension headers

    def _extensions_pending(self) -> bool:
        return self._overrides is not None or self._long_name is not None or self._long_link is not None

    def _begin_extension(self, fields: Header) -> None:
        self._extensions += 1
        limit = self._limits.archive.extension_bytes
        kind, size = fields.typeflag, fields.size
        if self._extensions > self._limits.archive.extensions:
            raise RejectedError(EXTENSION_REPEATED, f"more than {self._limits.archive.extensions} extension headers")
        taken = {b"x": self._overrides, b"L": self._long_name, b"K": self._long_link}.get(kind)
        if taken is not None:
            raise RejectedError(EXTENSION_REPEATED, f"a second extension header of type {kind.decode()}")
        gnu = self._long_name is not None or self._long_link is not None
        if (kind == b"x" and gnu) or (kind in b"LK" and self._overrides is not None):
            raise RejectedError(EXTENSION_MIXED, "PAX and GNU extension headers for one member")
        if kind == b"g" and self._extensions_pending():
            # Go's reader hands a global header out as an entry of its own and forgets what came before it.
            raise RejectedError(EXTENSION_MIXED, "a global header between an extension header and its member")
        if kind in b"LK":
            # Twice as long as what is left when `./` and doubled slashes are gone, and its length is judged.
            limit = min(limit, 2 * max(self._limits.names.path_bytes, self._limits.names.link_target_bytes))
        if size > limit or fields.size_blank:
            raise RejectedError(EXTENSION_TOO_LARGE, f"an extension header of {size} bytes, limit {limit}")
        self._kind_of_extension, self._body = kind, bytearray()
        self._expect(_EXTENSION, size)
        if size == 0:
            self._end_extension()

    def _on_extension(self, chunk: memoryview, position: int, end: int) -> int:
        taken = min(self._left, end - position)
        self._body += chunk[position : position + taken]
        self._left -= taken
        if self._left == 0:
            self._state = _PADDING if self._padding else _HEADER
            try:
                self._end_extension()
            except RejectedError as error:
                raise error.at(None, self.entries + 1, self._start) from None
        return position + taken

    def _end_extension(self) -> None:
        body, self._body = bytes(self._body), bytearray()
        if self._kind_of_extension == b"x":
            self._overrides = pax.parse(body, self._limits)
        elif self._kind_of_extension == b"g":
            pax.parse_global(body, self._limits)
            self._findings.dropped[pax.COMMENT_DROPPED] += 1
        elif self._kind_of_extension == b"L":
            self._long_name = _long(body)
        else:
            self._long_link = _long(body)

    # ---------------------------------------------------------------- members

    def _expect(self, state: int, size: int) -> None:
        """Say what comes behind this header: ``size`` bytes of something, padded to whole blocks."""
        self._left = size
        self._padding = -size % BLOCK_BYTES
        self._state = state if size else _HEADER

    def _begin_member(self, fields: Header, offset: int) -> None:
        """Read a member's own header: first what frames it, then what it means."""
        self.entries += 1
        if self.entries > self._max_entries:
            raise RejectedError(ENTRIES_TOO_MANY, f"more than {self._max_entries} members")
        overrides, long_name, long_link = self._overrides, self._long_name, self._long_link
        name, target = long_name or fields.name, long_link or fields.linkname
        if overrides is not None:
            name = fields.name if overrides.path is None else overrides.path
            target = fields.linkname if overrides.linkpath is None else overrides.linkpath
        kind = _KINDS.get(fields.typeflag, -1)
        if kind < 0:
            which = SPARSE_FILE if fields.typeflag == b"S" else TYPE_UNKNOWN
            raise RejectedError(which, f"a member of type {fields.typeflag!r}", name)
        if fields.typeflag == b"\0" and name.endswith(b"/"):
            kind = DIRECTORY  # version 7 has no type for directories
        try:
            size = self._size(fields, kind)
        except RejectedError as error:
            raise error.at(name, self.entries, offset) from None
        at = offset + BLOCK_BYTES
        converts = overrides is None or overrides.binary or overrides.names_are_text
        self.claims.append(_new(Claim, (self._start, kind, name, target, size, at, converts)))
        self._start, self._extensions = -1, 0
        self._overrides = self._long_name = self._long_link = None
        self._expect(_DATA, size)
        self._record, self._fresh = -1, True
        try:
            place = (self.entries, offset)
            self._record = self._sink(self._judge.judge(fields, overrides, kind, name, target, size, place))
        except RejectedError as error:
            self._findings.refuse(error.at(name, self.entries, offset))

    def _size(self, fields: Header, kind: int) -> int:
        """Return the size that PAX record and header agree on."""
        size = fields.size
        claimed = None if self._overrides is None else self._overrides.size
        if claimed is not None:
            # Writers of PAX leave 0, blank or the largest number in a header that cannot hold the size.
            unable = claimed > _MAX_OCTAL_SIZE and size in (0, _MAX_OCTAL_SIZE)
            if not unable and (size != claimed or fields.size_blank):
                raise RejectedError(PAX_CONFLICT, f"PAX size {claimed}, header size {size}")
            size = claimed
        elif fields.size_blank:
            raise RejectedError(header.NUMBER_MALFORMED, "size is blank")
        if size and kind != FILE:
            raise RejectedError(SIZE_ON_BODYLESS, f"{size} bytes of data on a {rules.TYPE_NAMES[kind]}")
        if size > self._max_file_bytes:
            raise RejectedError(FILE_TOO_LARGE, f"{size} bytes, limit {self._max_file_bytes}")
        return size

    # ---------------------------------------------------------------- data

    def _on_data(self, position: int, end: int, jobs: list[Job]) -> int:
        taken = min(self._left, end - position)
        self._left -= taken
        if self._record >= 0:
            jobs.append((self._record, position, position + taken, self._fresh, self._left == 0))
            self._fresh = False
        position += taken
        if self._left == 0:
            if position + self._padding <= end:  # nearly always: no need to come back for it
                position += self._padding
                self._padding = 0
            self._state = _PADDING if self._padding else _HEADER
        return position


def _long(body: bytes) -> bytes:
    """Return a GNU long name: ended by one NUL or more by most writers, by its size by others."""
    name = body.rstrip(b"\0")
    if not name or b"\0" in name:
        raise RejectedError(LONG_NAME_MALFORMED, "an empty long name, or a NUL before its end")
    return name
