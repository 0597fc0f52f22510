#!/usr/bin/env bash
# Run a training command so that drain.sh can ask it to stop.
#
#   launch/driver.sh COMMAND [ARGUMENT...]
#
# Exits as the command does: `ebm-dist train` with 75 (try again) where it was asked to stop and has
# written its checkpoint. EBM_DIST_DRIVERS is where drivers of this machine are listed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/processes.sh
source "$here/processes.sh"

if (($# == 0)); then
  printf 'usage: launch/driver.sh COMMAND [ARGUMENT...]\n' >&2
  exit 2
fi
drivers="${EBM_DIST_DRIVERS:-${TMPDIR:-/tmp}/ebm_dist-drivers-$UID}"
(umask 077 && mkdir -p "$drivers") || exit 1
if ! is_private "$drivers"; then
  printf 'error: %s: expected a directory of this user with mode 700; remove it, or %s\n' "$drivers" \
    "name another in EBM_DIST_DRIVERS" >&2
  exit 2
fi
mine=$(mktemp -d "$drivers/XXXXXX") || exit 1
trap 'rm -rf "$mine"' EXIT
# A job's stop signals every process of the job, so the command has its own; a second SIGTERM,
# passed on from here, would end it in the middle of its checkpoint.
trap ':' TERM INT

"$@" </dev/null &
child=$!
# At once whole: drain.sh may read it at any time.
identity_of "$child" >"$mine/pid.part" && mv "$mine/pid.part" "$mine/pid"
code=0
wait "$child" || code=$?
# A signal to this shell ends `wait` before the command has ended.
while kill -0 "$child" 2>/dev/null; do
  code=0
  wait "$child" || code=$?
done
exit "$code"
