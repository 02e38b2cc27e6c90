"""The upper directory of an overlay as an OCI layer: a tarball whose bytes depend on nothing but that directory.

Source: OCI image specification, layer.md: whiteouts, opaque whiteouts, hard links within a layer.
Rule 1: depth first, names in byte order, no owner names, whole seconds; a pax header only where ustar cannot.
Rule 2: what a layer cannot say (a socket) is an error, never left out in silence.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

MOUNT_POINTS: Final = ("dev", "proc", "sys", "run", "tmp")  # filled while the image is built, empty in the layer
WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"


def pack(upper: Path, lowers: Sequence[Path], tarball: Path, latest_mtime_s: int) -> None:
    """Write ``upper``, an overlay's changes on ``lowers``, to ``tarball``; later times become ``latest_mtime_s``."""
    first_names: dict[tuple[int, int], str] = {}
    with tarfile.open(tarball, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in _walk(upper, ""):
            path = upper / name
            found = path.lstat()
            entry = _entry(name, path, found, min(int(found.st_mtime), latest_mtime_s))
            if found.st_nlink > 1 and stat.S_ISREG(found.st_mode):
                first = first_names.setdefault((found.st_dev, found.st_ino), name)
                if first != name:
                    entry.type, entry.linkname, entry.size, entry.pax_headers = tarfile.LNKTYPE, first, 0, {}
            if entry.isreg() and entry.size:
                with path.open("rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)
            if entry.isdir() and _is_opaque(path) and any((lower / name).is_dir() for lower in lowers):
                tar.addfile(_empty_file(f"{name}/{OPAQUE}", entry.mtime))


def _walk(top: Path, name: str) -> Iterator[str]:
    for child in sorted(os.listdir(top / name), key=os.fsencode):
        path = f"{name}/{child}" if name else child
        yield path
        if (top / path).is_dir() and not (top / path).is_symlink() and path not in MOUNT_POINTS:
            yield from _walk(top, path)


def _entry(name: str, path: Path, found: os.stat_result, mtime_s: int) -> tarfile.TarInfo:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFCHR and found.st_rdev == 0:  # overlayfs(5): a whiteout is a character device 0/0
        folder, _, last = name.rpartition("/")
        return _empty_file(f"{folder}/{WHITEOUT}{last}" if folder else WHITEOUT + last, mtime_s)
    entry = tarfile.TarInfo(name)
    entry.mode, entry.uid, entry.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
    entry.mtime = mtime_s
    types = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}
    if kind not in types:
        raise ValueError(f"{name}: no layer of these recipes has a file of mode {found.st_mode:o}")
    entry.type = types[kind]
    if entry.isreg():
        entry.size = found.st_size
    elif entry.issym():
        entry.linkname = os.readlink(path)
    entry.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in sorted(_xattrs(path).items())}
    return entry


def _empty_file(name: str, mtime_s: float) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.mtime = 0, mtime_s
    return entry


def _xattrs(path: Path) -> dict[str, str]:
    """Return the attributes of the image itself; overlayfs keeps its own notes below trusted.overlay."""
    names = (name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith("trusted."))
    return {name: os.getxattr(path, name, follow_symlinks=False).decode("utf-8", "surrogateescape") for name in names}


def _is_opaque(path: Path) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque", follow_symlinks=False) == b"y"
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return False
