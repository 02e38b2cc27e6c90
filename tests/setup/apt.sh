#!/bin/bash
# Install the Debian packages that are missing: tests/setup/apt.sh FILE|NAME...
#
# A FILE holds one package a line, "#" starts a comment.
# Rule 1: nothing is called when nothing is missing; the package lists are fetched only when they are needed.
# Rule 2: no daemon is started or enabled by being installed, and no file of /etc stays changed but those of packages.
# Rule 3: no question is asked; without root, sudo is used for apt alone.
set -euo pipefail
export LC_ALL=C.UTF-8

as_root=()
if [[ $EUID -ne 0 ]]; then as_root=(sudo); fi

wanted=()
for argument in "$@"; do
    if [[ -f $argument ]]; then
        mapfile -t -O "${#wanted[@]}" wanted < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$argument")
    else
        wanted+=("$argument")
    fi
done

missing=()
for name in "${wanted[@]}"; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$name" 2>/dev/null) || status=absent
    if [[ $status != installed ]]; then missing+=("$name"); fi
done
if [[ ${#missing[@]} -eq 0 ]]; then exit 0; fi

apt_get() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l \
        apt-get --quiet --quiet --option=DPkg::Lock::Timeout=300 --option=Acquire::Retries=3 \
        --option=Dpkg::Use-Pty=0 "$@" </dev/null
}

log=$(mktemp)
# invoke-rc.d(8) and deb-systemd-invoke(1p) ask this file before they start anything; 101 is "not allowed".
policy=/usr/sbin/policy-rc.d
if [[ -e $policy ]]; then
    trap 'rm -f "$log"' EXIT
else
    # Armed first: a policy that is left behind would keep every later daemon of this machine from starting.
    trap '"${as_root[@]}" rm -f "$policy"; rm -f "$log"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
fi

installed() {
    dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p' | sort --unique
}

install_missing() {
    apt_get install --yes --no-install-recommends "${missing[@]}"
}

installed_before=$(installed)
echo "apt-get install ${missing[*]}"
{
    if ! ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1; then apt_get update; fi
    # Lists that are too old name files that the mirror has no more: fetch them once and try again.
    install_missing || { apt_get update && install_missing; }
} >"$log" 2>&1 || { cat "$log" >&2; exit 1; }

# The servers of the tests are started by the tests, with their own configuration, never by a boot. What Swift's
# packages bring along (a system logger, cron) is switched off too where it was not wanted before.
if ! command -v systemctl >/dev/null; then exit 0; fi
for name in $(comm -13 <(echo "$installed_before") <(installed)); do
    case $name in swift-* | memcached | rsync | rsyslog | cron | cron-daemon-common | logrotate) ;; *) continue ;; esac
    mapfile -t units < <(dpkg-query --listfiles "$name" |
        sed -n 's,^\(/usr\)\?/lib/systemd/system/\([^/@]*\.\(service\|timer\)\)$,\2,p')
    if [[ ${#units[@]} -ne 0 ]]; then
        "${as_root[@]}" systemctl --quiet disable "${units[@]}" >/dev/null 2>&1 ||
            echo "apt.sh: could not disable ${units[*]}" >&2
    fi
done
