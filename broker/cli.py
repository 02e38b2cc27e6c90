"""The command line: what can be typed, and nothing else.

Rule 1: this file declares; broker/commands.py does. Heavy imports happen there, inside the functions that need them.
Rule 2: standard output carries results, standard error everything else; every command knows `--json`.
Rule 3: one place turns errors into three lines and an exit code.
"""

import io
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NoReturn, TypeVar

import click

from broker import console, settings
from broker.errors import ImgpullError, Problem

F = TypeVar("F", bound=Callable[..., Any])
EPILOG: Final = (
    "Exit codes are sysexits(3): 0 done, 65 refused, 69 unavailable, 73 no room, 75 try again, 77 not permitted."
)
CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
SECTIONS: Final = {
    "Images": ("pull", "plan", "ls", "show", "rm", "verify", "gc", "check", "pins"),
    "Devices": ("activate", "deactivate"),
    "Work": ("runs", "log", "resume", "cancel"),
    "Host": ("doctor", "pool", "df", "policy"),
    "Help": ("explain", "config", "completion", "version"),
}


class Formatter(click.HelpFormatter):
    """Help for narrow terminals too, which click takes for 50 columns: the names take less than half of the line."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        if width is None:
            width = max(20, min(shutil.get_terminal_size().columns, max_width or 80) - 2)
        super().__init__(indent_increment, width, max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write names and texts side by side."""
        super().write_dl(rows, min(col_max, self.width // 2 - 4), col_spacing)


class Context(click.Context):
    """What click asks for a formatter."""

    formatter_class = Formatter


class Command(click.Command):
    """A command of the program."""

    context_class = Context


class Commands(click.Group):
    """Commands that share their first word."""

    context_class = Context
    command_class = Command


class Program(click.Group):
    """The program: its commands by section, and wrong command lines told like every other error."""

    context_class = Context
    command_class = Command
    group_class = Commands

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, each with one line."""
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].short_help or "") for name in names], col_max=12)

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """Run the command line; what click says of a wrong one becomes three lines or one object."""
        words = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what this locale cannot write is no error
                stream.reconfigure(errors=console.IN_ASCII)
        try:
            result = super().main(words, standalone_mode=False, **extra)
        except click.UsageError as error:
            sys.exit(_wrong_usage(error, words))
        except click.Abort:
            sys.exit(128 + signal.SIGINT)
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)
        return result


def _wrong_usage(error: click.UsageError, words: Sequence[str]) -> int:
    """Tell what is wrong with a command line. Returns: the exit code."""
    path = error.ctx.command_path if error.ctx else "imgpull"
    if type(error).__name__ == "NoArgsIsHelpError":
        click.echo(error.format_message(), err=True)
        return error.exit_code
    what, _, hint = error.format_message().partition(". ")  # the hint is click's: `Did you mean 'pull'?`
    hint = hint.strip("()")
    advice = f"{hint[:1].lower()}{hint[1:]} see `{path} --help`".lstrip()
    console.print_problem(Problem("usage", what[:1].lower() + what[1:].rstrip("."), "", advice), "--json" in words)
    return error.exit_code


def _option(*names: str, setting: str, **more: Any) -> Callable[[F], F]:
    """Declare an option whose value is a setting: absent means that the other sources decide."""
    row = settings.BY_NAME[setting]
    more.setdefault("help", row.help[0].upper() + row.help[1:] + ".")
    if row.type is bool:
        more.update(is_flag=True, default=None)
    elif row.choices:
        more["type"] = click.Choice([c for c in row.choices if c])
    return click.option(*names, setting, **more)


def common(function: F) -> F:
    """Options of every command."""
    function = click.option("--debug", is_flag=True, help="Show tracebacks.")(function)
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")(function)


def s3_options(function: F) -> F:
    """Where and how S3 is spoken to; the spelling is the AWS CLI's."""
    for option in reversed(
        [
            _option("--endpoint-url", setting="endpoint_url", metavar="URL"),
            _option("--region", setting="region"),
            _option("--profile", setting="profile"),
            _option("--no-sign-request", setting="no_sign_request"),
            _option("--request-payer", setting="request_payer"),
            _option("--quirks", setting="quirks"),
            _option("--addressing-style", setting="addressing"),
            _option("--ca-bundle", setting="ca_bundle", metavar="FILE"),
        ]
    ):
        function = option(function)
    return function


def list_options(function: F) -> F:
    """Options of every command that prints a list; the letters are zfs(8)'s."""
    function = click.option("-p", "exact", is_flag=True, help="Exact values, separated by tabs.")(function)
    function = click.option("-H", "no_header", is_flag=True, help="No header line.")(function)
    function = click.option("--sort", metavar="COLUMN", help="Sort by a column; -COLUMN sorts downwards.")(function)
    return click.option("-o", "chosen", metavar="COLUMNS", help="Columns to show, separated by commas.")(function)


def _known(kind: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what a shell asks for words of a kind: images, names of devices, runs, codes and rules."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
        from broker import commands

        try:
            return [word for word in commands.known_words(settings.load({}), kind) if word.startswith(incomplete)]
        except ImgpullError:
            return []

    return complete


SETTING_NAMES: Final = frozenset(settings.BY_NAME)


def _run(command: str, /, **arguments: Any) -> NoReturn:
    """Call the command's function with the settings in force and end with its exit code."""
    from broker import commands

    flags = {k: v for k, v in arguments.items() if k in SETTING_NAMES and v is not None}
    rest = {k: v for k, v in arguments.items() if k not in SETTING_NAMES}
    debug = rest.pop("debug", False)
    as_json = rest.get("as_json", False)
    try:
        code = getattr(commands, command)(settings.load(flags), **rest)
        sys.stdout.flush()
    except ImgpullError as error:
        if debug:
            traceback.print_exc()
        console.print_problem(error.problem, as_json)
        code = error.problem.exit_code
    except BrokenPipeError:
        _silence_stdout()
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("imgpull: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except Exception as error:
        if debug:
            traceback.print_exc()
        problem = Problem("bug", "imgpull has a bug", f"{type(error).__name__}: {error}")
        console.print_problem(problem, as_json)
        code = problem.exit_code
    sys.exit(code or 0)


def _silence_stdout() -> None:
    """Keep the interpreter's last flush from complaining about a reader that went away."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@click.group(cls=Program, context_settings=CONTEXT, epilog=EPILOG)
def imgpull() -> None:
    """Pull container root filesystems from S3 into thin snapshots, trusting not one byte of them."""


@imgpull.command(short_help="Bring an image in and activate it; print its device.")
@click.argument("ref")
@click.option("--name", help="Name of the activation; the default is the last word of REF.")
@click.option("--refresh", is_flag=True, help="Ask S3 whether the objects changed, also if the image is ready.")
@click.option("--no-activate", is_flag=True, help="Only bring the layers in.")
@click.option("--size", metavar="SIZE", help="Grow the activation's filesystem, for example 20G.")
@click.option("--expect", multiple=True, metavar="sha256:HEX", help="Digest of each layer's object, lowest first.")
@_option("--pin-file", setting="pin_file", metavar="FILE", help="Refuse whatever this file does not list, see `pins`.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result alone.")
@click.option("--timing", is_flag=True, help="Tell at the end how long each stage worked and waited.")
@_option("--progress", setting="progress")
@_option("--limit-rate", setting="rate_limit", metavar="RATE", help="Bandwidth of this pull, for example 50M.")
@s3_options
@common
def pull(**arguments: Any) -> None:
    """Pull the image REF and activate it; print its device.

    REF is s3://BUCKET/PREFIX for a family of layers 1.tar, 2.tar, … or s3://BUCKET/KEY.tar for one tarball. What is
    there already is not done again; an image that is ready costs no network and no root.
    """
    _run("pull", **arguments)


@imgpull.command(short_help="Say what a pull would do; nothing is done.")
@click.argument("ref")
@click.option("--name", help="Name of the activation; the default is the last word of REF.")
@click.option("--no-activate", is_flag=True, help="Only bring the layers in.")
@s3_options
@common
def plan(**arguments: Any) -> None:
    """Show what `pull REF` would do; nothing is done.

    Told are the bytes to fetch, the layers that are here already, what root would be asked, and the room in the pool,
    counted as root counts it. Ends with 73 if the pool has no room.
    """
    _run("plan", **arguments)


@imgpull.command(short_help="Show what images take in the pool, and how many more fit.")
@list_options
@common
def df(**arguments: Any) -> None:
    """Show what each image takes in the pool, alone and shared, and how many more would fit."""
    _run("df", **arguments)


@imgpull.command(short_help="List the images, or the devices given out.")
@click.option("--activations", is_flag=True, help="List the devices given out instead of the images.")
@list_options
@common
def ls(**arguments: Any) -> None:
    """List the images that are ready."""
    _run("ls", **arguments)


@imgpull.command(short_help="Show one image: layers, origins, devices.")
@click.argument("image", shell_complete=_known("images"))
@common
def show(**arguments: Any) -> None:
    """Show an image: its layers, where they come from, what was dropped from them, its devices."""
    _run("show", **arguments)


@imgpull.command(short_help="Print a pin file of the images that are here.")
@click.argument("images", nargs=-1, metavar="[IMAGE]...", shell_complete=_known("images"))
@common
def pins(**arguments: Any) -> None:
    """Print the digest of each object of the images, as it was when it was first fetched.

    The output is a pin file: `imgpull pull --pin-file FILE`, or the setting `pin_file`, refuses any other content.
    """
    _run("pins", **arguments)


@imgpull.command(short_help="Give out one more device of an image; print it.")
@click.argument("image", shell_complete=_known("images"))
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--name", help="Name of the activation; the default is the last word of the image's reference.")
@click.option("--ro", "mode", flag_value="ro", help="A read-only device.")
@click.option("--rw", "mode", flag_value="rw", default="rw", help="A snapshot of your own to write to (default).")
@click.option("--size", metavar="SIZE", help="Grow the snapshot's filesystem, for example 20G.")
@click.option("--firecracker", is_flag=True, help="Print the drive's JSON for Firecracker's API.")
@common
def activate(**arguments: Any) -> None:
    """Give out a device with the image IMAGE; print it.

    With --ro, a COMMAND after `--` runs inside a read-only mount of it that no path reaches:
    `imgpull activate --ro golang -- find . -perm -4000`. The device that is made for it goes with it, whatever either
    dies of; a device of this --name that stood before stays. Its exit code is the command's.
    """
    _run("activate", **arguments)


@imgpull.command(short_help="Take a device back.")
@click.argument("name", shell_complete=_known("activations"))
@common
def deactivate(**arguments: Any) -> None:
    """Take back the device NAME; what was written to it is lost."""
    _run("deactivate", **arguments)


@imgpull.command(short_help="Remove an image and the layers that only it needs.")
@click.argument("image", shell_complete=_known("images"))
@common
def rm(**arguments: Any) -> None:
    """Remove the image IMAGE and the layers that nothing else needs."""
    _run("rm", **arguments)


@imgpull.command(short_help="Check tarballs by the rules alone: no S3, no root.")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--manifest", is_flag=True, help="Print the merged tree, one JSON object a line.")
@click.option("--all/--first", "all_violations", default=True, help="List every violation, or stop at the first.")
@common
def check(**arguments: Any) -> None:
    """Check tarballs FILES as layers 1, 2, … of one image: no S3, no root, no store.

    Ends with 0 if they are accepted and 65 if they are refused; every violation is listed with its rule and place.
    """
    _run("check", **arguments)


@imgpull.command(short_help="Show the root helper's pool.")
@common
def pool(**arguments: Any) -> None:
    """Show the pool that the root helper serves."""
    _run("pool", **arguments)


@imgpull.command(short_help="Look at all that imgpull needs; say how to mend it.")
@click.option("--repair", is_flag=True, help="First rebuild a damaged, lost or outdated state from what root holds.")
@click.argument("ref", required=False)
@s3_options
@common
def doctor(**arguments: Any) -> None:
    """Look at everything that imgpull needs and say how to mend what is wrong; ends with 1 on a failure.

    With REF, S3 is asked for that image too: reachability, credentials, the clock.
    """
    _run("doctor", **arguments)


@imgpull.command(short_help="Have root compare layers with their manifests.")
@click.argument("image", required=False, shell_complete=_known("images"))
@common
def verify(**arguments: Any) -> None:
    """Have root read the layers of IMAGE (or of all) again and compare them with their manifests."""
    _run("verify", **arguments)


@imgpull.command(short_help="Remove layers and cached blobs that nothing needs.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be removed.")
@common
def gc(**arguments: Any) -> None:
    """Remove layers that no image needs, and cached blobs beyond the cache's size, least recently used first."""
    _run("gc", **arguments)


def _one_run(_: click.Context, __: click.Parameter, words: tuple[str, ...]) -> str | None:
    """Take `RUN` and `show RUN` for the same."""
    words = words[1:] if words[:1] == ("show",) else words
    if len(words) > 1:
        raise click.UsageError(f"got unexpected extra argument ({words[1]})")
    return words[0] if words else None


@imgpull.command(short_help="List the runs, or show one.")
@click.argument("run_id", metavar="[[show] RUN]", nargs=-1, callback=_one_run, shell_complete=_known("runs"))
@click.option("--active", is_flag=True, help="Only those that have not ended: at work or interrupted.")
@list_options
@common
def runs(**arguments: Any) -> None:
    """List the runs, or show one."""
    _run("runs", **arguments)


@imgpull.command(short_help="Tell every step of the pulls of an image.")
@click.argument("image", shell_complete=_known("images"))
@common
def log(**arguments: Any) -> None:
    """Show every step, attempt, duration and reason of the pulls of IMAGE."""
    _run("log", **arguments)


@imgpull.command(short_help="Go on with interrupted runs.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=_known("runs"))
@_option("--progress", setting="progress")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@common
def resume(**arguments: Any) -> None:
    """Go on with interrupted runs: all, or one."""
    _run("resume", **arguments)


@imgpull.command(short_help="Cancel a run; what is done is kept.")
@click.argument("run_id", metavar="RUN", shell_complete=_known("runs"))
@common
def cancel(**arguments: Any) -> None:
    """Cancel a run and the runs that it started; what is done is kept."""
    _run("cancel", **arguments)


@imgpull.command(short_help="Tell what a rule or an error code means; offline.")
@click.argument("word", metavar="[RULE|CODE]", required=False, shell_complete=_known("words"))
@common
def explain(**arguments: Any) -> None:
    """Tell what a rule of the checker or an error code means; without a word, list them. Offline."""
    _run("explain", **arguments)


@imgpull.group(short_help="Show the settings and where each comes from.")
def config() -> None:
    """Settings."""


@config.command(name="show")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@list_options
@common
def config_show(**arguments: Any) -> None:
    """Show the settings in force."""
    _run("config_show", **arguments)


@imgpull.group(short_help="Show what is granted; try that the rest is denied.")
def policy() -> None:
    """What is granted and limited, and live proof that the rest is denied."""


@policy.command(name="show")
@click.argument("word", required=False)
@list_options
@common
def policy_show(**arguments: Any) -> None:
    """Show every limit, grant and system call in force and where it is written; WORD narrows the list."""
    _run("policy_show", **arguments)


@policy.command(name="audit")
@list_options
@common
def policy_audit(**arguments: Any) -> None:
    """Try from inside each sandbox, and at the root helper's door, what must be denied; ends with 1 if any is not."""
    _run("policy_audit", **arguments)


@imgpull.command(short_help="Print the completion script for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell: `source <(imgpull completion bash)`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(imgpull, {}, "imgpull", "_IMGPULL_COMPLETE").source())


@imgpull.command(short_help="Print the versions in use.")
@common
def version(**arguments: Any) -> None:
    """Print the versions of this program and of what it stands on."""
    _run("version", **arguments)


def main() -> None:
    """Run the command line."""
    imgpull(prog_name="imgpull")


if __name__ == "__main__":
    main()
