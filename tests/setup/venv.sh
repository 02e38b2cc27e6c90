#!/bin/bash
# Make .venv as constraints.txt says, from Debian's own Python: tests/setup/venv.sh
#
# Rule 1: the same constraints give the same packages; the build tools are pinned with the rest.
# Rule 2: a .venv that is right already costs a few milliseconds; one that is not right is made anew.
set -euo pipefail
cd "$(dirname "$0")/../.."
export LC_ALL=C.UTF-8 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

python=/usr/bin/python3
stamp=.venv/imgpull-setup
key=$({ echo "$PWD"; "$python" -V; cat constraints.txt pyproject.toml tests/setup/venv.sh; } | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then exit 0; fi

echo "making .venv with $("$python" -V), about a minute"
rm -rf .venv
"$python" -m venv .venv
# No build isolation: it would fetch build tools that nothing pins.
mapfile -t build_tools < <(grep -E '^(hatchling|editables)==' constraints.txt)
.venv/bin/python -m pip install -qq --constraint constraints.txt "${build_tools[@]}"
.venv/bin/python -m pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[test]'
echo "$key" >"$stamp"
