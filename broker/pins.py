"""Pin files: which content each object must have, in a text file that people keep beside their other configuration.

Rule 1: one object a line, ``sha256:HEX  s3://BUCKET/KEY``, as ``imgpull pins`` prints it; ``#`` begins a comment line.
Rule 2: with a pin file in force an image is exactly what the file lists of it: an object that is not listed is refused,
        and so is an image that lacks a listed one.
Rule 3: the file says nothing of endpoints: content is the same wherever it lies.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from broker.errors import ImgpullError
from broker.reference import Reference

LINE: Final = re.compile(r"(sha256:[0-9a-f]{64})[ \t]+(s3://[^/]+/.+)")
MAX_BYTES: Final = 64 << 20


def demanded(path: str, reference: Reference) -> dict[str, str] | None:
    """Return what a pin file demands of an image: a digest by key. None if no file is in force.

    Raises: ImgpullError `configuration` with the line that cannot be read.
    """
    if not path:
        return None
    listed = _read(Path(path).expanduser())
    place = f"s3://{reference.bucket}/"
    if reference.family:
        inside = f"{place}{reference.prefix}"
        return {name.removeprefix(place): digest for name, digest in listed.items() if name.startswith(inside)}
    name = f"{place}{reference.path}"
    return {reference.path: listed[name]} if name in listed else {}


def _read(path: Path) -> dict[str, str]:
    """Return the digests of a pin file by object. Raises: ImgpullError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        lines = raw.decode().splitlines()
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be read") from error
    except UnicodeDecodeError as error:
        raise _unusable(path, f"byte {error.start} is not UTF-8") from error
    if len(raw) > MAX_BYTES:
        raise _unusable(path, f"it has more than {MAX_BYTES} bytes")
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if match is None:
            raise _unusable(path, f"line {number}: expected `sha256:HEX  s3://BUCKET/KEY`")
        digest, name = match.groups()
        if listed.setdefault(name, digest) != digest:
            raise _unusable(path, f"line {number}: another digest for {name}")
    return listed


def _unusable(path: Path, why: str) -> ImgpullError:
    return ImgpullError("configuration", f"{path}: not a usable pin file", why, "write it anew: `imgpull pins > FILE`")


def check_complete(reference: Reference, demands: Mapping[str, str], keys: Iterable[str]) -> None:
    """Refuse an image that has other objects than its pins. Raises: ImgpullError `digest-mismatch`."""
    found = set(keys)
    unpinned, missing = sorted(found - demands.keys()), sorted(demands.keys() - found)
    if unpinned:
        why = f"not in the pin file: {', '.join(unpinned[:5])}"
    elif missing:
        why = f"in the pin file, but not in the image: {', '.join(missing[:5])}"
    else:
        return
    raise ImgpullError("digest-mismatch", f"{reference} is not the image that is pinned", why)


def listed(reference: str, layers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return what a pin file says of an image that is here: a digest by object; ``layers`` as the store lists them."""
    bucket = Reference.parse(reference).bucket
    return {f"s3://{bucket}/{layer['key']}": layer["digest"] for layer in layers}
