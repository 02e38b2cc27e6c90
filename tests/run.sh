#!/bin/bash
# All tests: tests/run.sh PYTHON [PYTEST OPTIONS]; without options, those of the virtual machine go on beside the others.
#
# Rule 1: the virtual machine emulates one processor, so it takes one of this machine's and no more.
# Rule 2: its output is held back until the others have ended, and printed whole: neither is mixed into the other.
# Rule 3: Ctrl-C and SIGTERM end both, and both take down what they have set up.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
if [[ $# -gt 0 ]]; then exec "$python" -m pytest "$@"; fi

log=$(mktemp --suffix=.log)
trap 'rm -f "$log"' EXIT
# A shell lets what it starts in the background ignore SIGINT; pytest shall hear it.
env --default-signal=INT IMGPULL_TESTS_BESIDE=1 "$python" -m pytest -p no:cacheprovider tests/vm >"$log" 2>&1 </dev/null &
machine=$!
trap 'kill -INT "$machine" 2>/dev/null' INT TERM
"$python" -m pytest -p no:cacheprovider --ignore=tests/vm
failed=$?
until wait "$machine"; status=$?; ! kill -0 "$machine" 2>/dev/null; do :; done
echo "tests in the virtual machine:"
cat "$log"
if [[ $failed -eq 0 ]]; then failed=$status; fi
exit "$failed"
