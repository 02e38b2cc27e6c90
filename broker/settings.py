"""Where every setting comes from: flags, then the environment, then your file, then the system's files, then defaults.

Rule 1: one table, SETTINGS, names each setting, its type, its variable and its default; nothing else reads them.
Rule 2: an unknown key or a wrong type is an error that names the file, the line and the nearest key.
Rule 3: every value remembers its origin (`imgpull config show --origin`).

The AWS SDK's own files (~/.aws) and credentials are left to it, untouched. Source of the paths: XDG Base Directory
Specification 0.8; file-hierarchy(7). Source of the AWS_* names: AWS SDKs and Tools Reference Guide, "Settings".
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from broker.errors import ImgpullError

SYSTEM_DIR: Final = Path("/etc/imgpull")
POLICY_DIR: Final = Path(__file__).resolve().parent.parent / "policy"  # the same in a source tree and in a wheel
HELPER_SOCKET: Final = "/run/imgpull/helper.sock"  # policy/systemd/imgpull-helper.socket
UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Row(NamedTuple):
    """One setting. ``choices`` bounds a string; ``unit`` tells people what a number counts."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    unit: str = ""
    aws: tuple[str, ...] = ()  # variables of the AWS SDK that mean the same; ours goes before them

    @property
    def variables(self) -> tuple[str, ...]:
        """Its environment variables, the strongest first."""
        return ("IMGPULL_" + self.name.upper(), *self.aws)


SETTINGS: Final = (
    Row(
        "endpoint_url", str, "", "URL of an S3 server that is not AWS", aws=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    ),
    Row("region", str, "", "AWS region of the bucket", aws=("AWS_REGION", "AWS_DEFAULT_REGION")),
    Row("profile", str, "", "profile of the AWS configuration", aws=("AWS_PROFILE", "AWS_DEFAULT_PROFILE")),
    Row("no_sign_request", bool, False, "send unsigned requests, for public buckets"),
    Row("request_payer", bool, False, "accept the charges of a requester-pays bucket"),
    Row("quirks", str, "", "kind of S3 server", ("", "aws", "ceph", "garage", "seaweedfs", "tigris", "r2", "swift")),
    Row("addressing", str, "", "how the bucket is named in URLs", ("", "auto", "path", "virtual")),
    Row("pin_file", str, "", "file with the digest of every object that may be pulled; empty is none"),
    Row("ca_bundle", str, "", "file of certificates to trust instead of the system's", aws=("AWS_CA_BUNDLE",)),
    Row("max_streams", int, 8, "parallel ranged requests of one pull"),
    Row("rate_limit", int, 0, "bandwidth of one pull; 0 is no limit", unit="bytes/s"),
    Row("min_rate", int, 1024, "a stream slower than this is started anew", unit="bytes/s"),
    Row("fetch_deadline", int, 3600, "longest time for one object", unit="s"),
    Row("cache_size", int, 20 << 30, "blobs kept beyond this are removed, least recently used first", unit="bytes"),
    Row("state_dir", str, "", "where the state database and the manifests lie"),
    Row("cache_dir", str, "", "where fetched blobs lie"),
    Row("helper_socket", str, HELPER_SOCKET, "the root helper's socket"),
    Row("progress", str, "auto", "how progress is shown", ("auto", "tty", "plain", "json", "none")),
    Row("metrics_file", str, "", "Prometheus textfile to write after each pull; empty is none"),
)
BY_NAME: Final = {row.name: row for row in SETTINGS}


@dataclass(frozen=True, slots=True)
class Value:
    """One setting in force and where it comes from."""

    value: Any
    origin: str


class Settings:
    """All settings in force. ``settings.region`` is the value, ``settings.values["region"].origin`` its origin."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = dict(values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name].value
        except KeyError:
            raise AttributeError(name) from None

    @property
    def source(self) -> str:
        """Name the S3 world that a reference belongs to: the same reference at two endpoints is two images.

        An endpoint that only a profile of ~/.aws/config names is known to the SDK alone: the profile stands for it.
        """
        return str(self.endpoint_url or (f"profile:{self.profile}" if self.profile else ""))

    @property
    def state(self) -> Path:
        """The folder of the state database."""
        return Path(self.state_dir)

    @property
    def cache(self) -> Path:
        """The folder of the blobs."""
        return Path(self.cache_dir)


def load(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, system_dir: Path = SYSTEM_DIR) -> Settings:
    """Put the settings together; ``flags`` holds only those that were given.

    Raises: ImgpullError `configuration`.
    """
    home = environ.get("HOME") or os.path.expanduser("~")
    defaults = {row.name: Value(row.default, "default") for row in SETTINGS}
    defaults["state_dir"] = Value(_xdg(environ, "XDG_STATE_HOME", home, ".local/state"), "default")
    defaults["cache_dir"] = Value(_xdg(environ, "XDG_CACHE_HOME", home, ".cache"), "default")
    values = defaults
    for path in _files(environ, home, system_dir):
        values.update(_read_file(path))
    for row in SETTINGS:
        for variable in reversed(row.variables):
            text = environ.get(variable)
            if text is not None and (text or variable not in row.aws):  # the SDK takes an empty variable for none
                values[row.name] = Value(_convert(row, text, variable), variable)
    for name, value in flags.items():
        row = BY_NAME[name]
        values[name] = Value(_convert(row, value, "the command line"), "command line")
    return Settings(values)


def _xdg(environ: Mapping[str, str], variable: str, home: str, fallback: str) -> str:
    base = environ.get(variable, "")
    return os.path.join(base if os.path.isabs(base) else os.path.join(home, fallback), "imgpull")


def _files(environ: Mapping[str, str], home: str, system_dir: Path) -> list[Path]:
    """Return the files that exist, weakest first."""
    config = environ.get("XDG_CONFIG_HOME", "")
    user = Path(config if os.path.isabs(config) else os.path.join(home, ".config")) / "imgpull" / "config.toml"
    try:
        drop_ins = sorted((system_dir / "conf.d").glob("*.toml"))
    except OSError:
        drop_ins = []
    return [p for p in (system_dir / "config.toml", *drop_ins, user) if p.is_file()]


def _read_file(path: Path) -> dict[str, Value]:
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ImgpullError("configuration", f"{path} cannot be read", str(error)) from error
    values = {}
    for key, untrusted_value in found.items():
        match = re.search(rf"(?m)^\s*\"?{re.escape(key)}\"?\s*[=.]|^\s*\[+\s*{re.escape(key)}", text)
        where = f"{path}:{text.count(chr(10), 0, match.start()) + 1 if match else 1}"
        if key not in BY_NAME:
            near = difflib.get_close_matches(key, BY_NAME, 1)
            hint = f"did you mean `{near[0]}`?" if near else "see `imgpull config show` for all keys"
            raise ImgpullError("configuration", f"{where}: unknown key `{key}`", hint)
        values[key] = Value(_convert(BY_NAME[key], untrusted_value, where), where)
    return values


def _convert(row: Row, untrusted: Any, where: str) -> Any:
    """Return the value in the setting's type; text is read as the environment and the command line give it."""
    try:
        if row.type is bool:
            value: Any = untrusted if isinstance(untrusted, bool) else _boolean(untrusted)
        elif row.type is int:
            value = untrusted if type(untrusted) is int else _number(row, str(untrusted))
        elif isinstance(untrusted, str):
            value = untrusted
        else:
            raise ValueError(f"expected text, got {untrusted!r}")
        if row.choices and value not in row.choices:
            raise ValueError(f"expected one of {', '.join(c for c in row.choices if c)}, got {value!r}")
        if row.type is int and not 0 <= value <= 1 << 50:
            raise ValueError(f"expected 0 to {1 << 50}, got {value}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ImgpullError("configuration", f"{where}: `{row.name}` is wrong", str(error)) from error
    return value


def _number(row: Row, text: str) -> int:
    """Return a number; one of bytes may be written as a size."""
    if row.unit.startswith("bytes"):
        return parse_size(text)
    if not text.isdecimal():
        raise ValueError(f"expected a whole number, got {text!r}")
    return int(text)


def _boolean(text: str) -> bool:
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
        "": False,
    }
    if text.lower() not in words:
        raise ValueError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def parse_size(text: str) -> int:
    """Return a number of bytes from `20G`, `512MiB`, `1048576`; the units are powers of 1024.

    Raises: ValueError.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match:
        raise ValueError(f"expected a size such as 20G or 512M, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]]) if "." in match[1] else int(match[1]) * UNITS[match[2]]
