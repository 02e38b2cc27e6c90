"""Three families of five layers each, of the shape that real buckets have, at any size.

Rule 1: layers 1 to 3 are the same bytes in all three, layer 4 in two: 15 keys, 8 blobs.
Rule 2: what makes real layers hard is in them: parents declared again, absolute links, hard links across layers, setuid
        and setgid programs, a sticky folder, files of other users, whiteouts.
"""

import io
import os
import random
import tarfile
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
FAMILIES: Final = ("golang", "node", "python")
#: MiB of each blob at full size: 2.8 GB flattened, 1.47 GB when each is stored once.
BLOBS: Final = {
    "1": 110, "2": 70, "3": 300, "4-golang-node": 370, "4-python": 260, "5-golang": 120, "5-node": 120, "5-python": 120,
}  # fmt: skip
FILES: Final = 4  # that hold almost all of a blob's bytes


def blob_of(family: str, number: int) -> str:
    """Return which blob is layer ``number`` of a family."""
    candidates = (str(number), f"{number}-{family}", f"{number}-golang-node")
    return next(name for name in candidates if name in BLOBS)


def flattened_bytes(scale: int) -> int:
    """Return what the three images hold when each is stored whole."""
    return sum(BLOBS[blob_of(family, number)] for family in FAMILIES for number in range(1, 6)) * MIB // scale


def stored_once_bytes(scale: int) -> int:
    """Return what their distinct blobs hold."""
    return sum(BLOBS.values()) * MIB // scale


def write_bucket(folder: Path, scale: int) -> None:
    """Write bucket/images/FAMILY/N.tar for every key; keys with the same bytes are one file."""
    blobs = folder.parent / "blobs"
    blobs.mkdir(parents=True)
    for name, size_mib in BLOBS.items():
        write_layer(blobs / name, name, size_mib * MIB // scale)
    for family in FAMILIES:
        (folder / "bucket/images" / family).mkdir(parents=True)
        for number in range(1, 6):
            os.link(blobs / blob_of(family, number), folder / "bucket/images" / family / f"{number}.tar")

    with tarfile.open(folder / "bucket/images/single.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "etc", tarfile.DIRTYPE, mode=0o755)
        add(tar, "etc/motd", data=b"an image of one layer\n")


def write_layer(path: Path, name: str, size_bytes: int) -> None:
    """Write one layer as plain ustar."""
    source, number = random.Random(name), int(name[0])
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for parent in ("usr", "usr/bin", "opt", "etc", "etc/alternatives"):  # again in every layer
            add(tar, parent, tarfile.DIRTYPE, mode=0o755)
        add(tar, "tmp", tarfile.DIRTYPE, mode=0o1777)
        add(tar, f"usr/bin/su{number}", mode=0o4755, data=b"#!/bin/sh\n")
        add(tar, f"usr/bin/wall{number}", mode=0o2755, gid=5, data=b"#!/bin/sh\n")
        add(tar, f"etc/alternatives/awk{number}", tarfile.SYMTYPE, link="/usr/bin/mawk")
        add(tar, f"opt/gone-in-{number + 1}", data=b"x")
        if number > 1:
            add(tar, f"opt/.wh.gone-in-{number}")
            add(tar, f"usr/bin/su-again{number}", tarfile.LNKTYPE, link=f"usr/bin/su{number - 1}")
        for part in range(FILES):
            add(tar, f"opt/part-{name}-{part}", uid=1000 + number, data=source.randbytes(size_bytes // FILES))


def add(
    tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, *, mode: int = 0o644, uid: int = 0, gid: int = 0,
    link: str = "", data: bytes = b"",
) -> None:  # fmt: skip
    """Add one entry."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.uid, entry.gid, entry.linkname, entry.size = kind, mode, uid, gid, link, len(data)
    entry.mtime = 1_700_000_000
    tar.addfile(entry, io.BytesIO(data))
