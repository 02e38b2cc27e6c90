"""What an unprivileged worker may report to the broker, and what the broker asks of it.

Rule 1: a worker is hostile once it has read its first hostile byte; so every word of it passes one of these models.
Rule 2: strict, frozen, no extra fields, every string and number bounded.
Rule 3: nothing here decides anything; the broker does.

Both workers speak JSON Lines: one object a line, at most MAX_LINE bytes, UTF-8 with ``\\u`` escapes (ASCII only). Names
taken from an archive or a bucket that are not UTF-8 travel as surrogate escapes.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_LINE: Final = 1 << 20  # bytes of one report; a refusal with many violations is the longest
MAX_LAYERS: Final = 1000  # of one image

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=1 << 50)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
RuleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{2,63}$")]
Text = Annotated[str, Field(max_length=8192)]
Key = Annotated[str, Field(min_length=1, max_length=1024)]
ETag = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")]
FetchCode = Literal[
    "no_such_object", "no_such_bucket", "access_denied", "credentials_missing", "credentials_rejected", "wrong_region",
    "unavailable", "timed_out", "too_slow", "changed", "digest_mismatch", "too_large", "no_space", "bad_response",
    "listing_too_long", "io_error", "configuration", "sandbox",
]  # fmt: skip


class Message(BaseModel):
    """A frozen message with exactly its declared fields."""

    # Validators are built at their first use: a checker needs one of all these, and starts 15 ms earlier.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)


# ---------------------------------------------------------------- unpriv.check


class CheckJob(Message):
    """What one run of ``unpriv.check`` shall do; descriptors are numbers of its own table.

    Descriptor 0 is the blob (read), 1 takes the report, 2 takes one last line if all else fails.
    """

    media: Literal["tar", "tar+gzip", "tar+zstd", "tar+bzip2", "tar+xz"]
    layer_number: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1  # for messages only
    gate_fd: Annotated[int, Field(ge=3, le=4096)] | None = None  # a pipe: a byte comes as each lower one is whole
    lower: Annotated[
        list[Annotated[int, Field(ge=3, le=4096)]], Field(max_length=MAX_LAYERS)
    ] = []  # manifests, lowest first
    manifest_fd: Annotated[int, Field(ge=3, le=4096)] | None = None  # where the manifest goes
    payload_fd: Annotated[int, Field(ge=3, le=4096)] | None = (
        None  # where the uncompressed tar of a compressed blob goes
    )
    tree_fd: Annotated[int, Field(ge=3, le=4096)] | None = None  # where the merged tree goes, one object a line
    all_violations: bool = False  # list every violation (bounded), not only the first


class Violation(Message):
    """One broken rule. ``entry`` counts tar members from 1; ``offset`` is in bytes of the uncompressed tar."""

    rule: RuleName
    layer: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    entry: Count | None = None
    offset: Size | None = None
    name: Text | None = None  # escaped for people, never raw bytes
    reason: Text


class Accepted(Message):
    """A blob became a manifest."""

    type: Literal["accepted"] = "accepted"
    layer: Digest  # sha256 of the manifest's bytes
    parent: Digest | None
    manifest_bytes: Size
    payload_bytes: Size  # of the uncompressed tar
    entries: Count  # tar members
    operations: Count  # lines of the manifest after the first
    content_bytes: Size  # of regular files
    dropped: dict[RuleName, Count] = {}  # metadata that honest images carry and we do not keep, counted by rule
    omitted: Annotated[
        list[Text], Field(max_length=10_000)
    ] = []  # entries left out by the operator's `omit` switch, escaped
    warnings: Annotated[list[Violation], Field(max_length=1000)] = []  # such as clamped times


class Rejected(Message):
    """A blob broke at least one rule. ``complete`` tells whether all its violations are listed."""

    type: Literal["rejected"] = "rejected"
    violations: Annotated[list[Violation], Field(min_length=1, max_length=1000)]
    complete: bool = False


class CheckProgress(Message):
    """How far a check has come, in bytes of the blob."""

    type: Literal["progress"] = "progress"
    done_bytes: Size


# ---------------------------------------------------------------- unpriv.fetch


class Endpoint(Message):
    """Where and how to talk to S3. None means: as the AWS configuration of the user says."""

    endpoint_url: Annotated[str, Field(max_length=2048)] | None = None
    region: Annotated[str, Field(max_length=64)] | None = None
    profile: Annotated[str, Field(max_length=256)] | None = None
    no_sign_request: bool = False
    request_payer: bool = False
    quirks: Literal["aws", "ceph", "garage", "seaweedfs", "tigris", "r2", "swift"] | None = None
    addressing: Literal["auto", "path", "virtual"] | None = None
    ca_bundle: Annotated[str, Field(max_length=4096)] | None = None


class Hello(Message):
    """First line to the fetcher. It answers with Ready once its sandbox holds."""

    type: Literal["hello"] = "hello"
    endpoint: Endpoint
    blob_dir: Annotated[str, Field(max_length=4096)]
    max_streams: Annotated[int, Field(ge=1, le=64)] = 8
    rate_limit: Annotated[int, Field(ge=0, le=1 << 40)] = 0  # bytes a second, all streams together; 0 is none
    min_rate: Annotated[int, Field(ge=0, le=1 << 30)] = 1024  # bytes a second over the watchdog's window
    deadline_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0  # of one object


class List(Message):
    """List the objects under a prefix, at most MAX_LAYERS + 1 of them, no deeper level."""

    type: Literal["list"] = "list"
    id: Count
    bucket: Annotated[str, Field(min_length=1, max_length=255)]
    prefix: Annotated[str, Field(max_length=1024)]


class Head(Message):
    """Ask for one object's pin."""

    type: Literal["head"] = "head"
    id: Count
    bucket: Annotated[str, Field(min_length=1, max_length=255)]
    key: Key


class Pin(Message):
    """One object as it was when it was resolved; all that is fetched later must match it."""

    bucket: Annotated[str, Field(min_length=1, max_length=255)]
    key: Key
    size: Size
    etag: ETag  # with its quotes, as S3 sends it
    version: Annotated[str, Field(max_length=1024)] | None = None


class Fetch(Message):
    """Bring one pinned object into the blob directory. ``expect`` refuses any other content."""

    type: Literal["fetch"] = "fetch"
    id: Count
    pin: Pin
    expect: Digest | None = None


Seconds = Annotated[int, Field(ge=-(1 << 40), le=1 << 40)]  # how far our clock is ahead of the server's, if it told


class Ready(Message):
    """The fetcher's sandbox holds; ``layers`` names what took and what the kernel lacks."""

    type: Literal["ready"] = "ready"
    sandbox: dict[Annotated[str, Field(max_length=32)], Annotated[str, Field(max_length=128)]]
    credentials: Annotated[str, Field(max_length=128)]  # the source's name, never a secret
    endpoint: Annotated[str, Field(max_length=2048)]  # the URL in force: part of a blob's identity


class Pins(Message):
    """Answer to List and Head."""

    type: Literal["pins"] = "pins"
    id: Count
    pins: Annotated[list[Pin], Field(max_length=MAX_LAYERS + 1)]
    clock_ahead_s: Seconds | None = None


class FetchProgress(Message):
    """How far one object has come. ``done_bytes`` may fall when a range has to be fetched again."""

    type: Literal["progress"] = "progress"
    id: Count
    done_bytes: Size


class Notice(Message):
    """Something a person wants to know: a retry and its reason, a restart because the object changed."""

    type: Literal["notice"] = "notice"
    id: Count
    message: Text


class Fetched(Message):
    """The blob is published as ``blob_dir/sha256/<hex>``: synced, renamed, its folder synced."""

    type: Literal["fetched"] = "fetched"
    id: Count
    digest: Digest
    size: Size
    transferred_bytes: Size  # over the network in this run, including what was fetched again


class FetchFailed(Message):
    """Answer to List, Head or Fetch that did not work. ``retryable``: the same request may work later."""

    type: Literal["failed"] = "failed"
    id: Count
    code: FetchCode
    message: Text
    retryable: bool
    clock_ahead_s: Seconds | None = None


CheckReport = Annotated[Accepted | Rejected | CheckProgress, Field(discriminator="type")]
FetchRequest = Annotated[List | Head | Fetch, Field(discriminator="type")]
FetchReport = Annotated[Ready | Pins | FetchProgress | Notice | Fetched | FetchFailed, Field(discriminator="type")]
