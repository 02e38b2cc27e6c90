#!/bin/bash
# Build the Debian package: tests/setup/deb.sh PYTHON [FOLDER]. Prints its path; LINTIAN=1 also asks lintian(1).
#
# Rule 1: it is built from a copy of the tree, with tests/setup/debian as its debian/, as any user; the tree stays as it is.
# Rule 2: PYTHON has pip and the pinned build tools: that of .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."
export LC_ALL=C.UTF-8
python=$(realpath --no-symlinks "$1")
folder=${2:-dist}
tests/setup/apt.sh debhelper dpkg-dev ${LINTIAN:+lintian} >&2

scratch=$(mktemp -d /var/tmp/imgpull-deb-XXXXXX)
trap 'rm -rf "$scratch"' EXIT
tree=$scratch/imgpull
mkdir "$tree"
tar -c --exclude=__pycache__ broker unpriv privhelper policy pyproject.toml constraints.txt README.md SECURITY.md \
    CHANGELOG.md LICENSE | tar -x -C "$tree"
cp -R tests/setup/debian "$tree/debian"
(cd "$tree" && PYTHON=$python dpkg-buildpackage --build=binary --unsigned-changes --no-check-builddeps >"$scratch/log" 2>&1) ||
    { cat "$scratch/log" >&2; exit 1; }
mkdir -p "$folder"
package=$(basename "$scratch"/imgpull_*.deb)
cp "$scratch/$package" "$folder/"
echo "$folder/$package"
if [[ -n ${LINTIAN:-} ]]; then lintian --tag-display-limit 0 --fail-on error,warning "$scratch"/imgpull_*.changes; fi
