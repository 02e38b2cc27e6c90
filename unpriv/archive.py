"""The second reader: libarchive, which must see exactly what the strict reader saw. The only user of libarchive.

Rule 1: format tar and no filter are all that is ever enabled; nothing else of libarchive can be reached.
Rule 2: it is handed the same bytes, in the same buffers; it reports where it found data by pointer, so no byte of data
is compared twice, nor believed.
Rule 3: any result but OK and EOF is a refusal, warnings too. One warning is foretold from the bytes: names in a PAX
header that are not UTF-8, as Go's writers leave them (libarchive keeps the bytes and warns).

libarchive turns names of PAX headers into Unicode's composed form, and pairs of surrogates into one character (measured
with 3.6.2), so a name that differs is compared once more after decomposing both. Its own numbers, times and attributes
are never used.
"""

import ctypes
import re
import unicodedata
from collections import deque
from collections.abc import Callable
from typing import Final

from unpriv.reader import Claim
from unpriv.rulebook import RejectedError, rule
from unpriv.rules import BLOCK, CHAR, DIRECTORY, FIFO, FILE, HARDLINK, SYMLINK, TYPE_NAMES

READERS_DISAGREE: Final = rule("readers_disagree")

_PAIR: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")
LIBRARY: Final = "libarchive.so.13"  # by its name: ctypes.util.find_library() would run ldconfig and gcc
_OK, _EOF, _WARN, _FATAL = 0, 1, -20, -30
_FOUND: Final = {
    FILE: 0o100000, DIRECTORY: 0o040000, SYMLINK: 0o120000, CHAR: 0o020000, BLOCK: 0o060000, FIFO: 0o010000,
}  # fmt: skip
_CONVERSION_WARNINGS: Final = (b"Pathname", b"Linkname", b"Uname", b"Gname")  # "... can't be converted from UTF-8"

_Pointer = ctypes.c_void_p
# The interpreter's lock is kept over these calls: they are short, and giving it up costs more than most of them.
_library: Final = ctypes.PyDLL(LIBRARY)
_ReadCallback = ctypes.CFUNCTYPE(ctypes.c_ssize_t, _Pointer, _Pointer, ctypes.POINTER(_Pointer))


def _function(name: str, result: object, *arguments: object) -> Callable[..., object]:
    function = getattr(_library, f"archive_{name}")
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]  # ctypes makes functions of no known type


_read_new = _function("read_new", _Pointer)
_read_free = _function("read_free", ctypes.c_int, _Pointer)
_read_support_format_tar = _function("read_support_format_tar", ctypes.c_int, _Pointer)
_read_open = _function("read_open", ctypes.c_int, _Pointer, _Pointer, _Pointer, _ReadCallback, _Pointer)
_next_header = _function("read_next_header2", ctypes.c_int, _Pointer, _Pointer)
_header_position = _function("read_header_position", ctypes.c_longlong, _Pointer)
_error_string = _function("error_string", ctypes.c_char_p, _Pointer)
_data_block = _function(
    "read_data_block",
    ctypes.c_int,
    _Pointer,
    ctypes.POINTER(_Pointer),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_longlong),
)
_entry_new = _function("entry_new", _Pointer)
_entry_free = _function("entry_free", None, _Pointer)
_entry_pathname = _function("entry_pathname", ctypes.c_char_p, _Pointer)
_entry_filetype = _function("entry_filetype", ctypes.c_uint, _Pointer)
_entry_size = _function("entry_size", ctypes.c_longlong, _Pointer)
_entry_hardlink = _function("entry_hardlink", ctypes.c_char_p, _Pointer)
_entry_symlink = _function("entry_symlink", ctypes.c_char_p, _Pointer)

Pull = Callable[[], "tuple[memoryview, int] | None"]


class DisagreementError(Exception):
    """libarchive saw something else; turned into a refusal unless the strict reader finds a better word."""


class CrossReader:
    """One archive read by libarchive, member by member against the strict reader's claims."""

    def __init__(self, pull: Pull, claims: deque[Claim]):
        """``pull`` returns the next chunk and its offset after the strict reader was fed with it, None at the end."""
        self._pull = pull
        self._claims = claims
        self._base = 0  # address of the chunk in hand
        self._offset = 0  # of the chunk in the stream
        self._length = 0
        self._views: list[memoryview] = []  # the chunk in hand and the one before: libarchive may hold a copy of both
        self._offsets: list[int] = []
        self._error: BaseException | None = None
        self._pointer, self._block_bytes, self._logical = _Pointer(), ctypes.c_size_t(), ctypes.c_longlong()
        self._references = tuple(map(ctypes.byref, (self._pointer, self._block_bytes, self._logical)))
        self._callback = _ReadCallback(self._read)
        self._entry = _Pointer(_entry_new())  # type: ignore[arg-type]  # an address
        self._archive = _Pointer(_read_new())  # type: ignore[arg-type]

    def close(self) -> None:
        """Free what libarchive holds."""
        _read_free(self._archive)
        _entry_free(self._entry)

    def run(self) -> None:
        """Read to libarchive's end of the archive.

        Raises:
            DisagreementError: it saw something else.
            RejectedError: the strict reader did, while it was fed.
        """
        archive, entry = self._archive, self._entry
        self._expect(_read_support_format_tar(archive), "format tar")
        self._expect(_read_open(archive, None, None, self._callback, None), "open")
        position, claims, compare = _header_position, self._claims, self._compare
        while (result := _next_header(archive, entry)) != _EOF:
            if result != _OK and not self._is_foretold(result):
                self._expect(result, "header")
            if not claims:
                raise DisagreementError(f"libarchive has a member at {position(archive)}, the strict reader has none")
            compare(claims.popleft(), position(archive))
        self._raise()
        if claims:
            raise DisagreementError(f"libarchive ends before the member at {claims[0].start}")

    def _read(self, _archive: object, _context: object, chunk: "ctypes._Pointer[ctypes.c_void_p]") -> int:
        """Hand libarchive the next chunk; called by it. An exception cannot cross C: it is kept for run()."""
        try:
            pulled = self._pull()
            if pulled is None:
                return 0
            view, self._offset = pulled
            self._base = ctypes.addressof(ctypes.c_char.from_buffer(view))
            self._length = len(view)
            self._views = [view, *self._views[:1]]
            self._offsets = [self._offset, *self._offsets[:1]]
            chunk[0] = _Pointer(self._base)
            return self._length
        except BaseException as error:
            self._error = error
            return _FATAL

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _expect(self, result: object, what: str) -> None:
        if result != _OK:
            self._raise()
            said = _error_string(self._archive)
            shown = said.decode("utf-8", "backslashreplace") if isinstance(said, bytes) else "no reason given"
            raise DisagreementError(f"libarchive, {what}: {shown} ({result})")

    def _is_foretold(self, result: object) -> bool:
        """Tell if a result is the warning about names that the strict reader has found not to be text."""
        if result != _WARN or not self._claims or self._claims[0].converts:
            return False
        said = _error_string(self._archive)
        return isinstance(said, bytes) and said.startswith(_CONVERSION_WARNINGS) and b"converted" in said

    def _compare(self, claim: Claim, position: object) -> None:
        """Compare one member with the strict reader's claim."""
        start, kind, path, target, size, at, _ = claim
        entry = self._entry
        if position != start:
            raise DisagreementError(f"libarchive has a member at {position}, the strict reader at {start}")
        name = _entry_pathname(entry)
        if name != path and not _same_name(name, path):
            raise DisagreementError(f"the member at {start} has another name to libarchive: {name!r}")
        link = _entry_hardlink(entry)
        if kind == HARDLINK:
            if link != target and not _same_name(link, target):
                raise DisagreementError(f"the hard link at {start} has another target to libarchive: {link!r}")
        elif link is not None or _entry_filetype(entry) != _FOUND[kind]:
            raise DisagreementError(f"the member at {start} is no {TYPE_NAMES[kind]} to libarchive")
        if kind == SYMLINK and (link := _entry_symlink(entry)) != target and not _same_name(link, target):
            raise DisagreementError(f"the symbolic link at {start} has another target to libarchive: {link!r}")
        if _entry_size(entry) != size:
            raise DisagreementError(
                f"the member at {start} has {_entry_size(entry)} bytes to libarchive, expected {size}"
            )
        if size:
            self._compare_data(start, size, at)

    def _compare_data(self, start: int, size: int, at: int) -> None:
        """Expect the data of a file where the strict reader found it, and all of it."""
        pointer, length, logical = self._pointer, self._block_bytes, self._logical
        done = 0
        while done < size:
            result = _data_block(self._archive, *self._references)
            if result != _OK:
                self._expect(result, "data")
            address, count = pointer.value or 0, length.value
            if logical.value != done or count == 0 or done + count > size:
                raise DisagreementError(f"libarchive reads other pieces of the file at {start}")
            found = address - self._base + self._offset
            if found != at + done and not self._same_bytes(address, count, at + done):
                raise DisagreementError(f"libarchive reads the data of the file at {start} from {found}")
            done += count

    def _same_bytes(self, address: int, length: int, at: int) -> bool:
        """Compare what libarchive has copied for itself with the chunks that are still in their buffers."""
        copied = ctypes.string_at(address, length)
        expected = b""
        for view, offset in zip(reversed(self._views), reversed(self._offsets), strict=True):
            begin = max(at + len(expected) - offset, 0)
            if offset + begin == at + len(expected):
                expected += bytes(view[begin : begin + length - len(expected)])
        return copied == expected


def _same_name(theirs: object, ours: bytes) -> bool:
    """Tell if two names are canonically equivalent, as Unicode has it, but for slashes that mean nothing."""
    if not isinstance(theirs, bytes):
        return False
    left, right = _decomposed(theirs), _decomposed(ours)
    return left == right or left.replace("//", "/").rstrip("/") == right.replace("//", "/").rstrip("/")


def _decomposed(name: bytes) -> str:
    """Return a name with its characters decomposed, and pairs of surrogates (CESU-8) as the one that they stand for."""
    try:
        text = name.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return name.decode("latin-1")
    return unicodedata.normalize("NFD", _PAIR.sub(_one_character, text))


def _one_character(pair: re.Match[str]) -> str:
    high, low = map(ord, pair[0])
    return chr(0x10000 + ((high & 0x3FF) << 10 | low & 0x3FF))


def refusal(error: DisagreementError, entry: int) -> RejectedError:
    """Return a disagreement as the refusal that it is."""
    return RejectedError(READERS_DISAGREE, str(error), None, entry)
