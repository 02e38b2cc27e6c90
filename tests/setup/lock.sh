#!/bin/bash
# Write constraints.txt anew: the newest versions that pyproject.toml allows, from a clean environment of Debian's Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
export LC_ALL=C.UTF-8 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_CONSTRAINT

scratch=$(mktemp -d /var/tmp/imgpull-lock-XXXXXX)
trap 'rm -rf "$scratch"' EXIT
/usr/bin/python3 -m venv "$scratch/venv"
mapfile -t wanted < <(/usr/bin/python3 - <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
print(*project["build-system"]["requires"], "editables", sep="\n")
print(*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"], sep="\n")
PYTHON
)
"$scratch/venv/bin/python" -m pip install -qq "${wanted[@]}"
{
    echo "# Exact versions of everything that runs, tests and builds imgpull. Written by \`make lock\`; do not edit."
    "$scratch/venv/bin/python" -m pip freeze
} >"$scratch/constraints.txt"
cp "$scratch/constraints.txt" constraints.txt
