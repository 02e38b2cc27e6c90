#!/bin/bash
# Install the root helper as an administrator does: tests/setup/install-helper.sh ZIPAPP [DESTDIR]
#
# Rule 1: what policy/systemd holds is installed byte for byte; where the zipapp goes is read from its service unit.
# Rule 2: nothing is enabled or started, and no pool is made: those are the administrator's own words, printed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
zipapp=$1
destdir=${2:-}
umask 022

program=$(sed -n 's/^ExecStart=.*[[:space:]]\(\/[^[:space:]]*\.pyz\).*/\1/p' policy/systemd/*.service | sort --unique)
if [[ $(wc -l <<<"$program") -ne 1 || -z $program ]]; then
    echo "expected one zipapp in the ExecStart lines of policy/systemd/*.service, found: ${program:-none}" >&2
    exit 1
fi

install -D --owner=root --group=root --mode=0755 "$zipapp" "$destdir$program"
install -d --mode=0755 "$destdir/usr/local/sbin"
ln -sfn "$program" "$destdir/usr/local/sbin/imgpull-helper"
lib=$destdir/usr/local/lib # systemd.unit(5), sysusers.d(5), tmpfiles.d(5): the administrator's own files
for file in policy/systemd/*; do
    case $file in
        *sysusers*) target=$lib/sysusers.d/imgpull.conf ;;
        *tmpfiles*) target=$lib/tmpfiles.d/imgpull.conf ;;
        *.socket | *.service | *.slice) target=$lib/systemd/system/$(basename "$file") ;;
        *) continue ;;
    esac
    install -D --owner=root --group=root --mode=0644 "$file" "$target"
    echo "$target"
done
echo "$destdir$program"

if [[ -n $destdir || ! -d /run/systemd/system ]]; then exit 0; fi
systemd-sysusers "$lib/sysusers.d/imgpull.conf"
if [[ -e $lib/tmpfiles.d/imgpull.conf ]]; then systemd-tmpfiles --create "$lib/tmpfiles.d/imgpull.conf"; fi
systemctl daemon-reload
cat <<'NEXT'
Next:  imgpull-helper pool create                       once, on this host
       systemctl enable --now imgpull-helper.socket
       usermod --append --groups imgpull USER           who may ask it
NEXT
