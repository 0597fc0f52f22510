#!/usr/bin/env bash
# Run a training command so that drain.sh can ask it to stop.
#
#   launch/driver.sh COMMAND [ARGUMENT...]
#
# Exits as the command does: `ebm-dist train` with 75 (try again) where it was asked to stop and has
# written its checkpoint. EBM_DIST_DRIVERS is where drivers of this machine are listed.
set -uo pipefail

if (($# == 0)); then
  printf 'usage: launch/driver.sh COMMAND [ARGUMENT...]\n' >&2
  exit 2
fi
drivers="${EBM_DIST_DRIVERS:-${TMPDIR:-/tmp}/ebm_dist-drivers-$UID}"
(umask 077 && mkdir -p "$drivers") && mine=$(mktemp -d "$drivers/XXXXXX") || exit 1
trap 'rm -rf "$mine"' EXIT
# A job's stop signals every process of the job, so the command has its own; a second SIGTERM,
# passed on from here, would end it in the middle of its checkpoint.
trap ':' TERM INT

"$@" </dev/null &
child=$!
printf '%s\n' "$child" >"$mine/pid"
code=0
wait "$child" || code=$?
# A signal to this shell ends `wait` before the command has ended.
while kill -0 "$child" 2>/dev/null; do
  code=0
  wait "$child" || code=$?
done
exit "$code"
