"""What an image reference means: `s3://bucket/prefix` is a family of numbered layers, `s3://bucket/key.tar` one layer.

Rule 1: a reference is parsed once and has one canonical form.
Rule 2: the layers of a family are ordered as numbers (10 after 9), start at 1 and have no gap; a gap, a duplicate or a
        stray key is an error that names it. Nothing of a listing is skipped silently.
Rule 3: the compression is what the name declares; the checker refuses an archive that is something else.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Generic, Literal, Protocol, TypeAlias, TypeVar

from broker.errors import ImgpullError, UsageError

Media: TypeAlias = Literal["tar", "tar+gzip", "tar+zstd", "tar+bzip2", "tar+xz"]
SUFFIXES: Final[dict[str, Media]] = {
    ".tar": "tar",
    ".tar.gz": "tar+gzip",
    ".tgz": "tar+gzip",
    ".tar.zst": "tar+zstd",
    ".tzst": "tar+zstd",
    ".tar.bz2": "tar+bzip2",
    ".tbz2": "tar+bzip2",
    ".tar.xz": "tar+xz",
    ".txz": "tar+xz",
}
# S3 user guide, "Bucket naming rules"; capitals and underscores are older buckets of us-east-1 and other servers.
BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
LAYER_NAME: Final = re.compile(r"([1-9][0-9]{0,3})(\.[a-z0-9.]+)")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Keyed(Protocol):
    """Anything with a key and a size: a pinned object."""

    @property
    def key(self) -> str:
        """The object's key."""

    @property
    def size(self) -> int:
        """Its length in bytes."""


T = TypeVar("T", bound=Keyed)


def media_of(name: str) -> Media | None:
    """Return the compression that a file name declares, None for a name that declares none."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return SUFFIXES[suffix]
    return None


@dataclass(frozen=True, slots=True)
class Reference:
    """One image in S3. ``path`` is the key of a tarball, or the prefix of a family without its trailing slash."""

    bucket: str
    path: str
    family: bool

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read a reference as typed.

        Raises: UsageError that says what a reference looks like.
        """
        if not text.startswith("s3://"):
            raise UsageError(
                f"{text!r} is no image reference", advice="write s3://BUCKET/PREFIX or s3://BUCKET/KEY.tar"
            )
        bucket, _, path = text.removeprefix("s3://").partition("/")
        if not BUCKET.fullmatch(bucket):
            raise UsageError(f"{bucket!r} is no bucket name", advice="write s3://BUCKET/PREFIX or s3://BUCKET/KEY.tar")
        if len(path.encode(errors="surrogateescape")) > 1024 or any(ord(c) < 32 or ord(c) == 127 for c in path):
            raise UsageError(f"the key of {text!r} is too long or has control characters")
        family = path.endswith("/") or media_of(path) is None
        path = path.rstrip("/")
        if not path:
            raise UsageError(f"{text!r} names a whole bucket", advice="write s3://BUCKET/PREFIX or s3://BUCKET/KEY.tar")
        return cls(bucket, path, family)

    @property
    def prefix(self) -> str:
        """What to list for a family."""
        return self.path + "/"

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.path}" + ("/" if self.family and media_of(self.path) else "")

    @property
    def default_name(self) -> str:
        """The name of an activation when none is given: the last word of a family, `family-N` for one tarball of it."""
        parts = [p for p in self.path.split("/") if p]
        last = parts[-1]
        if not self.family:
            for suffix in sorted(SUFFIXES, key=len, reverse=True):
                last = last.removesuffix(suffix) if last.lower().endswith(suffix) else last
            if last.isdigit() and len(parts) > 1:
                last = f"{parts[-2]}-{last}"
        return clean_name(last)


def clean_name(text: str) -> str:
    """Return a name that the root helper accepts, made from any text; the digest keeps different texts apart."""
    if NAME.fullmatch(text):
        return text
    kept = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")[:48] or "image"
    return f"{kept}-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class Numbered(Generic[T]):
    """One layer of an image: its number from 1 and what its name declares."""

    number: int
    media: Media
    object: T


def order_layers(reference: Reference, untrusted_objects: list[T]) -> list[Numbered[T]]:
    """Return the layers of a family in order.

    Raises: ImgpullError `not-an-image` that names the gap, the duplicate or the stray key, or `no-such-object`.
    """
    found: dict[int, Numbered[T]] = {}
    for thing in untrusted_objects:
        name = thing.key.removeprefix(reference.prefix)
        if name == "" and thing.size == 0:
            continue  # what S3 consoles make for "create folder": the prefix itself, not a key below it
        match = LAYER_NAME.fullmatch(name)
        media = SUFFIXES.get(match[2]) if match and thing.key.startswith(reference.prefix) else None
        if match is None or media is None:
            raise _no_image(reference, f"stray key {thing.key!r}: expected N.tar, N.tar.gz or N.tar.zst with N from 1")
        number = int(match[1])
        if number in found:
            raise _no_image(reference, f"layer {number} is there twice: {found[number].object.key!r} and {thing.key!r}")
        found[number] = Numbered(number, media, thing)
    if not found:
        raise ImgpullError(
            "no-such-object", f"{reference}: no layers there", f"nothing is listed below {reference.prefix!r}"
        )
    missing = [n for n in range(1, max(found) + 1) if n not in found]
    if missing:
        raise _no_image(
            reference, f"layer {missing[0]} is missing: found {len(found)} layers up to number {max(found)}"
        )
    return [found[n] for n in sorted(found)]


def single_layer(reference: Reference, thing: T) -> list[Numbered[T]]:
    """Return the one layer of a tarball reference."""
    media = media_of(reference.path)
    if media is None:
        raise _no_image(reference, "the name of the tarball declares no known compression")
    return [Numbered(1, media, thing)]


def _no_image(reference: Reference, why: str) -> ImgpullError:
    return ImgpullError("not-an-image", f"{reference}: not the layers of one image", why)
