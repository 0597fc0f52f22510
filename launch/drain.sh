#!/usr/bin/env bash
# Ask every driver of this machine for a checkpoint and an end, and wait for it.
#
#   launch/drain.sh [SECONDS]      how long to wait at most; 110 when left out
#
# For a pod's preStop hook and a SLURM signal: what must happen before the node is taken away.
# Exits 0 when all have ended, 1 when time ran out: the checkpoint before is then the newest.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/processes.sh
source "$here/processes.sh"

patience="${1:-110}"
if [[ ! $patience =~ ^[0-9]+$ ]]; then
  printf 'error: SECONDS: expected a whole number, got %s\n' "$patience" >&2
  exit 2
fi
drivers="${EBM_DIST_DRIVERS:-${TMPDIR:-/tmp}/ebm_dist-drivers-$UID}"
[[ -e $drivers || -L $drivers ]] || exit 0
if ! is_private "$drivers"; then
  printf 'error: %s: expected a directory of this user with mode 700; remove it\n' "$drivers" >&2
  exit 2
fi
shopt -s nullglob
files=("$drivers"/*/pid)
for file in "${files[@]}"; do
  # Once: a second SIGTERM ends a run without its checkpoint.
  if still_runs "$file" && (set -o noclobber && : >"$(dirname "$file")/draining") 2>/dev/null; then
    kill -TERM "$pid" 2>/dev/null
  fi
done
deadline=$((SECONDS + patience))
for file in "${files[@]}"; do
  while still_runs "$file"; do
    if ((SECONDS >= deadline)); then
      printf 'drain: process %s still runs after %s s\n' "$pid" "$patience" >&2
      exit 1
    fi
    sleep 0.2
  done
done
