"""What can go wrong, said the same way everywhere: a stable code, what happened, why, and what to do next.

Rule 1: every error that a user meets is a Problem; its code is stable and `imgpull explain CODE` describes it offline.
Rule 2: exit codes are sysexits(3), which systemd knows by name; usage errors stay 2; a signal N is 128+N.
Rule 3: a Problem survives the database: an interrupted or finished run shows the very error of the first time.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the catalogue of errors."""

    exit_code: int
    title: str  # for `imgpull explain`
    advice: str  # the default third line
    retryable: bool = False


CATALOGUE: Final[dict[str, Kind]] = {
    "archive-rejected": Kind(
        65,
        "The archive breaks a rule. Nothing of it was given to root and no image exists.",
        "run `imgpull explain RULE`; the archive has to be made anew, trying again will not help",
    ),
    "digest-mismatch": Kind(
        65,
        "The content is not what was expected of it: by --expect, by a pin file, or by the manifest that root checked.",
        "find out who changed the object; do not pull it until you know",
    ),
    "not-an-image": Kind(
        65,
        "The keys under the prefix are no family of layers: 1.tar, 2.tar, … without gaps, duplicates or other keys.",
        "name a prefix that holds the layers of one image, or one tarball",
    ),
    "worker-failed": Kind(
        65,
        "The sandboxed checker ended without a verdict: killed by its sandbox or at a limit. The archive is refused.",
        "treat the archive as hostile; `imgpull check` on a copy tells more",
    ),
    "no-such-object": Kind(
        66, "S3 has no such object or bucket.", "check the bucket and the key: `aws s3 ls` shows them"
    ),
    "no-such-image": Kind(66, "No image of that name is known here.", "see `imgpull ls`"),
    "no-such-activation": Kind(66, "No activation of that name is yours.", "see `imgpull ls --activations`"),
    "no-such-run": Kind(66, "No run of that name is known here.", "see `imgpull runs`"),
    "helper-unavailable": Kind(
        69,
        "The root helper's socket cannot be reached.",
        "as root: `systemctl enable --now imgpull-helper.socket`; then see `imgpull doctor`",
        retryable=True,
    ),
    "pool-unavailable": Kind(
        69,
        "The pool is missing, read-only, failed or needs a check. It is never made or repaired by itself.",
        "as root: `imgpull-helper pool status` tells the way out",
    ),
    "s3-unavailable": Kind(
        69, "S3 could not be reached or kept failing.", "try again; what was fetched is kept", retryable=True
    ),
    "bug": Kind(70, "imgpull did something that it should never do.", "report it, with the output of --debug"),
    "no-room": Kind(
        73,
        "The pool or the cache has no room for it. Nothing was written.",
        "remove images (`imgpull rm`, `imgpull gc`) or grow the pool (`imgpull-helper pool grow`)",
    ),
    "io-error": Kind(
        74,
        "Reading, writing or syncing failed on this host. The layer in work is doomed and will be made anew.",
        "look at the kernel's log (`dmesg`), then pull again",
    ),
    "state-damaged": Kind(
        74,
        "The state database is damaged, lost, an older copy, foreign, or newer than this program.",
        "`imgpull doctor --repair` rebuilds it: no image is lost",
    ),
    "busy": Kind(75, "Somebody else holds what is needed, or it is in use.", "try again", retryable=True),
    "object-changed": Kind(
        75,
        "An object in S3 changed while it was fetched, several times in a row.",
        "pull again when nobody writes to the image",
        retryable=True,
    ),
    "interrupted": Kind(75, "Stopped on request. What was done is kept.", "run the same command again", retryable=True),
    "version-mismatch": Kind(76, "The root helper speaks another version.", "install the same version of both"),
    "access-denied": Kind(
        77,
        "S3 refuses these credentials, or there are none.",
        "check AWS_PROFILE and AWS_ACCESS_KEY_ID, or use --no-sign-request",
    ),
    "not-permitted": Kind(77, "The root helper's policy does not permit it.", "see `imgpull policy show`"),
    "configuration": Kind(78, "A setting is wrong.", "see `imgpull config show --origin`"),
    "usage": Kind(2, "The command line is wrong.", "see `imgpull --help`"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One error as a user sees it: three lines and data for programs.

    ``details`` holds JSON values only: violations of an archive, figures of a full pool.
    """

    code: str
    what: str
    why: str = ""
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.code not in CATALOGUE:
            raise ValueError(f"error code {self.code!r} is not in the catalogue")

    @property
    def kind(self) -> Kind:
        """Its row of the catalogue."""
        return CATALOGUE[self.code]

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with it."""
        return self.kind.exit_code

    def lines(self) -> tuple[str, str, str]:
        """Return what happened, why, and what to do next; what this error leaves out is the kind's."""
        return self.what, self.why or self.kind.title, self.advice or self.kind.advice

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints and that the database keeps."""
        return {
            **asdict(self),
            "why": self.why or self.kind.title,
            "advice": self.advice or self.kind.advice,
            "exit": self.exit_code,
            "retryable": self.kind.retryable,
        }

    def dump(self) -> str:
        """Return the text that the database keeps."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def load(cls, text: str) -> "Problem":
        """Read back what dump() wrote; any other text becomes a `bug` that quotes it."""
        try:
            found = json.loads(text)
            return cls(**found)
        except (ValueError, TypeError):
            return cls("bug", "a run ended with an error of an unknown form", text[:2000])


class ImgpullError(Exception):
    """An error that is shown to the user as its Problem."""

    def __init__(self, code: str, what: str, why: str = "", advice: str = "", **details: Any) -> None:
        self.problem = Problem(code, what, why, advice, details)
        super().__init__(what)

    @classmethod
    def of(cls, problem: Problem) -> "ImgpullError":
        """Raise a Problem that came out of the database or over a wire."""
        return cls(problem.code, problem.what, problem.why, problem.advice, **problem.details)

    def about(self, subject: str) -> "ImgpullError":
        """Return the same error with the subject in front of its first line."""
        return ImgpullError.of(replace(self.problem, what=f"{subject}: {self.problem.what}"))


class UsageError(ImgpullError):
    """The command line asks for something that cannot be."""

    def __init__(self, what: str, why: str = "", advice: str = "") -> None:
        super().__init__("usage", what, why, advice)
