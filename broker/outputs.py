"""What `--json` prints, command by command; published as policy/schema/output.json (`make manual` writes it).

Rule 1: nothing here runs when a command does; each test that uses `--json` holds the output against the schema.
Rule 2: within `"v": 1` fields are only added. Readers ignore fields and event types that they do not know.
Rule 3: lists hold every field of their rows unless `-o COLUMNS` chose some.
"""

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Bytes = Annotated[int, Field(ge=0, description="a number of bytes")]
Digest = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(ge=0, description="seconds")]
Millis = Annotated[int, Field(ge=0, description="milliseconds since the epoch")]
Mode = Literal["ro", "rw"]
Stage = Literal["waiting", "fetching", "checking", "committing", "ready", "shared", "failed"]
State = Literal["active", "interrupted", "done", "aborted", "cancelled", "handed_off", "quarantined"]


class Output(BaseModel):
    """One object; a field that may be absent has a default."""

    model_config = ConfigDict(extra="forbid")


class Line(Output):
    """What each line of events has in common."""

    v: Literal[1]
    time: Annotated[float, Field(description="seconds since the epoch")]


# ---------------------------------------------------------------- events


class BeginLayer(Output):
    """One layer of an image that is pulled."""

    layer: str
    bytes: Bytes


class Begin(Line):
    """The layers of an image are known."""

    type: Literal["begin"]
    image: str
    layers: list[BeginLayer]


class StageChange(Line):
    """A layer enters a stage; `total` bytes are to be done in it, 0 if that is not known."""

    type: Literal["stage"]
    layer: str
    stage: Stage
    total: Bytes


class Progress(Line):
    """A layer has come so far in its stage."""

    type: Literal["progress"]
    layer: str
    stage: Stage
    done: Bytes
    total: Bytes


class Notice(Line):
    """Something worth knowing, in words: a retry and its reason."""

    type: Literal["notice"]
    message: str
    layer: str = ""
    run: str = ""


class Error(Line):
    """How every command ends that does not succeed: the last line. `exit` is the exit code."""

    type: Literal["error"]
    code: Annotated[str, Field(description="stable; `imgpull explain CODE`")]
    what: str
    why: str
    advice: str
    exit: int
    retryable: bool
    details: Annotated[dict[str, Any], Field(description="violations of an archive, figures of a full pool")]


class Timing(Output):
    """Where the time of one layer went; waiting is apart from working."""

    layer: str
    waited_s: Seconds
    fetch_s: Seconds
    fetch_bytes: Bytes
    check_s: Seconds
    check_bytes: Bytes
    commit_s: Seconds
    commit_bytes: Bytes


class PullResult(Line):
    """An image is ready. `device` is null with --no-activate; `changed` is false where nothing had to be done."""

    type: Literal["result"]
    result: Literal["pull"]
    image: str
    top: Digest
    device: str | None
    changed: bool
    layers: int = 0
    reused: Annotated[int, Field(description="layers that were there already")] = 0
    transferred_bytes: Bytes = 0
    changed_layers: Annotated[list[int], Field(description="layers that --refresh found changed")] = []
    steps: Annotated[dict[str, float], Field(description="seconds of each step")] = {}
    timing: Annotated[list[Timing], Field(description="with --timing")] = []


class ActivateResult(Line):
    """A device was given out."""

    type: Literal["result"]
    result: Literal["activate"]
    image: str
    name: str
    device: str
    mode: Mode
    size: Bytes
    layer: Digest


class DeactivateResult(Line):
    """A device was taken back."""

    type: Literal["result"]
    result: Literal["deactivate"]
    name: str


class RemoveResult(Line):
    """An image is removed, and these layers with it."""

    type: Literal["result"]
    result: Literal["rm"]
    image: str
    layers: list[Digest]


class CollectResult(Line):
    """What nothing needed any more."""

    type: Literal["result"]
    result: Literal["gc"]
    dry_run: bool
    layers: list[Digest]
    blobs: list[Digest]
    partials: list[str]
    bytes: Bytes


class Remark(Output):
    """Something odd that is no reason to refuse an archive."""

    rule: str
    layer: int
    entry: int | None
    offset: int | None
    name: str | None
    reason: str


class AcceptedLayer(Output):
    """A tarball that is accepted as a layer."""

    type: Literal["accepted"]
    layer: Digest
    parent: Digest | None
    manifest_bytes: Bytes
    payload_bytes: Bytes
    entries: int
    operations: int
    content_bytes: Bytes
    dropped: dict[str, int]
    omitted: list[str]
    warnings: list[Remark]


class CheckResult(Line):
    """All files are accepted."""

    type: Literal["result"]
    result: Literal["check"]
    accepted: Literal[True]
    layers: list[AcceptedLayer]


class EndedRun(Output):
    """How a run that was taken up again ended."""

    run: str
    state: State
    reason: str | None


class ResumeResult(Line):
    """All interrupted runs have ended."""

    type: Literal["result"]
    result: Literal["resume"]
    runs: list[EndedRun]


class CancelResult(Line):
    """A run is cancelled, or had ended before."""

    type: Literal["result"]
    result: Literal["cancel"]
    run: str
    state: State


# ---------------------------------------------------------------- documents


class ImageRow(Output):
    """One image that is ready."""

    image: str
    id: str
    layers: int
    size: Annotated[int, Field(description="bytes as fetched")]
    content: Annotated[int, Field(description="bytes of the files of all layers")]
    pulled: Millis
    endpoint: str


class ActivationRow(Output):
    """One device given out."""

    name: str
    device: str
    mode: Mode
    size: Bytes
    live: bool
    image: str


class Notes(Output):
    """What the checker remarked on a layer it accepted."""

    dropped: dict[str, int]
    omitted: list[str]
    warnings: list[Remark]


class ShownLayer(Output):
    """One layer of an image; `images` have it in common."""

    number: int
    key: str
    etag: str
    version: str
    size: Bytes
    media: str
    digest: Digest
    layer: Digest
    entries: int
    content_bytes: Bytes
    payload_bytes: Bytes
    notes: Notes
    images: int
    fetched_ms: Annotated[int | None, Field(description="when these bytes were first fetched")] = None


class ShownActivation(Output):
    """One device of an image."""

    name: str
    device: str
    mode: Mode
    size: Bytes
    live: bool


class Shown(Output):
    """One image."""

    image: str
    endpoint: str
    top: Digest
    pulled_ms: Millis
    layers: list[ShownLayer]
    activations: list[ShownActivation]


class Pool(Output):
    """The pool as the root helper reports it; reflink has no metadata of its own."""

    state: Literal["ready", "absent", "read_only", "needs_check", "out_of_data", "failed"]
    data_bytes: Bytes
    data_used_bytes: Bytes
    metadata_bytes: Bytes
    metadata_used_bytes: Bytes
    block_bytes: Bytes
    reserved_bytes: Bytes


class PlannedLayer(Output):
    """One layer of a plan. Where `exact` is false, `bytes` is the least that it can be."""

    layer: int
    object: str
    state: Literal["here", "checked", "fetched", "new"]
    bytes: Bytes
    entries: int | None
    exact: bool
    fetch_bytes: Bytes


class Plan(Output):
    """What a pull would do. `pool`, and what follows from it, is null where the helper does not answer."""

    image: str
    layers: list[PlannedLayer]
    fetch_bytes: Bytes
    store_bytes: Bytes
    exact: bool
    commits: int
    activations: int
    pool: Pool | None
    pool_error: str
    data_blocks: int | None
    metadata_bytes: int | None
    fits: bool | None


class UsageRow(Output):
    """What one image takes."""

    ref: str
    exclusive: Bytes
    shared: Bytes
    fit: Annotated[int, Field(description="how many more of its size have room")]


class Usage(Output):
    """What images take of the pool."""

    images: list[UsageRow]
    pool: Pool
    store: Literal["reflink", "thin"]


class PoolReport(Output):
    """The pool, and how much is in it."""

    store: Literal["reflink", "thin"]
    policy: Digest
    pool: Pool
    layers: int
    activations: int


class PinnedObject(Output):
    """An object, and the content that it had when it was first fetched."""

    object: str
    digest: Digest


class RunRow(Output):
    """One run."""

    run: str
    machine: str
    state: State
    step: str
    attempt: int
    started: Millis
    subject: str


class RunEvent(BaseModel):
    """One event of a run; further fields are the event's own, such as `duration_ms`, `kind` and `reason`."""

    model_config = ConfigDict(extra="allow")
    type: str
    step: str | None
    attempt: int | None
    time_ms: Millis


class RunDetail(Output):
    """One run with its events."""

    run: str
    machine: str
    state: State
    step: str
    events: list[RunEvent]


class LoggedRun(Output):
    """One run of an image's history."""

    run: str
    machine: str
    subject: str
    state: State
    events: list[RunEvent]


class VerifiedLayer(Output):
    """One layer compared with its manifest; `reason` where it differs."""

    layer: Digest
    ok: bool
    files: int = 0
    bytes: Bytes = 0
    reason: str = ""


class Finding(Output):
    """One thing that `doctor` looked at."""

    verdict: Literal["ok", "warn", "fail"]
    subject: str
    text: str
    remedy: str


class SettingValue(Output):
    """One setting in force."""

    name: str
    value: str | int | bool
    unit: str
    origin: str


class GrantRow(Output):
    """One limit or grant in force, and where it is written."""

    key: str
    value: str
    origin: str


class AuditRow(Output):
    """One attempt at what must be denied."""

    place: str
    attempt: str
    expected: str
    got: str
    ok: bool


class CodeText(Output):
    """What an error code means."""

    code: str
    exit: int
    what: str
    advice: str
    retryable: bool


class RuleText(BaseModel):
    """What a rule of the checker is for."""

    model_config = ConfigDict(extra="allow")
    rule: str


class Drive(Output):
    """A drive for Firecracker's PUT /drives/{drive_id}."""

    drive_id: str
    path_on_host: str
    is_root_device: bool
    is_read_only: bool


Versions = dict[str, str]
Event = Begin | StageChange | Progress | Notice

# Command -> what it prints. A command that prints events prints its result as the last line.
STREAMS: Final[dict[str, Any]] = {
    "pull": Event | PullResult,
    "resume": Event | ResumeResult,
    "activate": ActivateResult | Drive,
    "deactivate": DeactivateResult,
    "rm": RemoveResult,
    "gc": CollectResult,
    "check": CheckResult,
    "cancel": CancelResult,
}
DOCUMENTS: Final[dict[str, Any]] = {
    "ls": list[ImageRow] | list[ActivationRow],
    "show": Shown,
    "plan": Plan,
    "df": Usage,
    "pool": PoolReport,
    "pins": list[PinnedObject],
    "runs": list[RunRow] | RunDetail,
    "log": list[LoggedRun],
    "verify": list[VerifiedLayer],
    "doctor": list[Finding],
    "config show": list[SettingValue],
    "policy show": list[GrantRow],
    "policy audit": list[AuditRow],
    "explain": CodeText | RuleText | list[CodeText],
    "version": Versions,
}


def schema() -> dict[str, Any]:
    """Return the JSON Schema: one property a command, and `error`, which each may print instead or at last."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for name, kind in {**STREAMS, **DOCUMENTS, "error": Error}.items():
        found = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}", mode="validation")
        definitions |= found.pop("$defs", {})
        properties[name] = found
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What imgpull prints with --json",
        "description": "One property a command. `pull`, `resume` and whatever changes something print JSON Lines, each "
        "line an object of the command's property; the others print one document. `error` is the last line of each "
        "command that does not succeed.",
        "properties": properties,
        "$defs": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """Return the text of policy/schema/output.json."""
    return json.dumps(schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
