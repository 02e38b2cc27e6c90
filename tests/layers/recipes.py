"""Which image families the tests build from Debian's packages: data only.

The shape is that of the images which the program is for: ordered layers, the lower ones shared, parents declared
again in each layer, setuid programs, hard links, absolute symbolic links, whiteouts, other owners, capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SUITE: Final = "bookworm"
SLIM: Final = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
)
LATEST_MTIME_S: Final = 1_747_000_000  # what the build itself touched is dated so: equal builds, equal tarballs


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: packages installed and then a script run as root, in a chroot on the layers below."""

    packages: tuple[str, ...] = ()
    unpacked: tuple[str, ...] = ()  # packages laid below /tmp/unpacked for the script, not installed
    script: str = "true"
    suffix: str = ".tar"  # .tar, .tar.gz or .tar.zst: how it lies in the bucket


@dataclass(frozen=True, slots=True)
class Recipe:
    """A base, made by mmdebstrap, and what is stacked on it; layer 1 of each family is the base."""

    name: str
    suites: tuple[str, ...]
    excluded: tuple[str, ...]  # path patterns that dpkg does not unpack
    families: dict[str, tuple[Layer, ...]]  # layers 2, 3, ...; equal layers on equal layers are built once


_COMMON: Final = Layer(
    # libcap2-bin lets the postinst of iputils-ping set a file capability where it would set setuid otherwise.
    packages=("ca-certificates", "iputils-ping", "less", "libcap2-bin", "netbase", "procps"),
    script="""
        getcap /usr/bin/ping | grep -q cap_net_raw
        rm /etc/issue.net                                           # a whiteout
        rm -r /etc/skel && mkdir /etc/skel                          # an opaque directory
        echo 'umask 077' >/etc/skel/.profile
        install -d -m 2775 -g staff /srv/shared                     # setgid
    """,
    suffix=".tar.zst",
)

DEMO: Final = Recipe(
    name="demo",
    suites=(SUITE,),
    excluded=SLIM,
    families={
        "base-tools": (
            _COMMON,
            Layer(
                packages=("curl", "file", "jq"),
                script="""
                    ln /usr/bin/curl /usr/local/bin/fetch           # a hard link to a file of this layer
                    ln /usr/bin/perl /usr/local/bin/perl            # and to one of the base, which this copies up
                    ln -s /usr/bin/jq /usr/local/bin/json           # an absolute link
                    rm -r /usr/share/bash-completion                # a whiteout of a directory
                """,
                suffix=".tar.gz",
            ),
        ),
        "base-python": (
            _COMMON,
            Layer(
                packages=("python3-minimal",),
                script="""
                    useradd --create-home --uid 1000 app
                    echo 'to be removed' >/home/app/notes
                    install -o app -g app -m 4750 /usr/bin/env /home/app/run    # setuid and not root's
                    rm /etc/motd && mkdir /etc/motd && echo hello >/etc/motd/01  # a file became a directory
                    rm -r /etc/update-motd.d && ln -s /etc/motd /etc/update-motd.d  # a directory became a link
                """,
            ),
            Layer(
                script="""
                    rm /home/app/notes                                          # a whiteout of a file of layer 3
                    printf 'print("hello from the image")\\n' >/home/app/hello.py
                    touch -d '2020-02-20 20:20:20Z' /home/app/.profile
                    python3 -c 'import os; os.setxattr("/home/app/hello.py", "user.origin", b"imgpull")'
                    chown app:app /home/app/hello.py
                """,
            ),
        ),
    },
)

_GO: Final = "golang-1.23"

FULL: Final = Recipe(
    name="full",
    suites=(SUITE, f"{SUITE}-backports"),
    excluded=(),
    families={
        "golang": (
            Layer(
                packages=(
                    "ca-certificates", "curl", "gnupg", "iputils-ping", "libcap2-bin",
                    "netbase", "sq", "tzdata", "wget",
                ),
                script="""
                    rm /etc/issue
                    rm -r /usr/share/doc/bash && mkdir /usr/share/doc/bash && echo x >/usr/share/doc/bash/README
                """,
            ),
            Layer(
                packages=("git", "mercurial", "openssh-client", "procps", "subversion"),
                script="rm -r /usr/share/doc/curl /usr/share/doc/wget",
            ),
            Layer(packages=("g++", "gcc", "libc6-dev", "make", "pkg-config"), script="rm /etc/issue.net"),
            Layer(
                unpacked=(f"{_GO}-go", f"{_GO}-src"),
                script="""
                    cp -a /tmp/unpacked/usr/share/go-1.23 /usr/local/go
                    cd /tmp/unpacked/usr/lib/go-1.23
                    rm -rf /usr/local/go/bin /usr/local/go/pkg
                    cp -aL bin pkg VERSION go.env /usr/local/go/
                    install -d -m 1777 /go /go/src /go/bin
                """,
            ),
        )
    },
)  # fmt: skip
RECIPES: Final = {recipe.name: recipe for recipe in (DEMO, FULL)}
