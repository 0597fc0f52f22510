#!/usr/bin/env bash
# Hand a run to a Ray cluster that is up already, through its dashboard.
#
#   launch/submit.sh --run-dir DIR [--address URL] [--submission-id ID] [--no-wait]
#                    CONFIG [KEY=VALUE...]
#
# DIR is a path on the cluster that outlives the head's machine, as a shared disk does; the same
# command again goes on from its newest checkpoint. URL is http://127.0.0.1:8265 when left out:
# forward that port to the head (ssh -L 8265:127.0.0.1:8265 HEAD). Only CONFIG is uploaded;
# ebm_dist and its data are on the cluster.
#
# Exits as the run does: 0 done, 75 stopped with its checkpoint written, 2 for what the user can mend,
# 1 failed. With --no-wait, 0 once the job is taken.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

address="http://127.0.0.1:$EBM_PORT_DASHBOARD"
run_dir=
config=
name=
wait=yes
overrides=()
options=()
while (($#)); do
  case $1 in
    --run-dir | --address | --submission-id)
      (($# > 1)) || fail "$1: expected a value"
      case $1 in
        --run-dir) run_dir=$2 ;;
        --address) address=$2 ;;
        --submission-id) name=$2 ;;
      esac
      shift 2
      ;;
    --no-wait)
      options+=(--no-wait)
      wait=
      shift
      ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*)
      fail "unknown option $1; see launch/submit.sh --help"
      ;;
    *)
      if [[ -z $config ]]; then config=$1; else overrides+=("$1"); fi
      shift
      ;;
  esac
done
[[ -n $config ]] || fail "expected CONFIG; see launch/submit.sh --help"
[[ -f $config ]] || fail "$config: no such file"
[[ $run_dir == /* ]] || fail "--run-dir: expected an absolute path on the cluster, got '$run_dir'"
if [[ ! $address =~ ^(https?)://(\[[^]]+\]|[^/:]+) ]]; then
  fail "--address: expected http://HOST:PORT or https://HOST:PORT, got $address"
fi
host=${BASH_REMATCH[2]//[\[\]]/}
if [[ ${BASH_REMATCH[1]} == http ]] && ! is_loopback "$host"; then
  fail "--address: http to $host would send the token in the clear; forward the port" \
    "(ssh -L $EBM_PORT_DASHBOARD:127.0.0.1:$EBM_PORT_DASHBOARD $host) or use https"
fi
require_token
need ray

# Ray uploads a whole directory: job, which holds the config and nothing else.
upload=$(mktemp -d)
trap 'rm -rf "$upload"' EXIT
mkdir "$upload/job"
cp "$config" "$upload/job/config.yaml"
# An address of this machine's own would be taken for the cluster's.
unset RAY_ADDRESS
name=${name:-ebm-dist-$(date +%Y%m%d-%H%M%S)-$RANDOM}
code=0
ray job submit --address "$address" --working-dir "$upload/job" --submission-id "$name" \
  "${options[@]}" -- ebm-dist train config.yaml "${overrides[@]}" --run-dir "$run_dir" \
  --resume auto 2>"$upload/stderr" || code=$?
# Ray tells these by tracebacks.
if ((code)) && grep -q AuthenticationError "$upload/stderr"; then
  fail "--address: the Ray at $address wants another token than this one ($(token_name)); put the" \
    "cluster's there, or name its file in RAY_AUTH_TOKEN_PATH"
elif ((code)) && grep -q 'Failed to connect to Ray' "$upload/stderr"; then
  fail "--address: no dashboard answers at $address; forward the head's port" \
    "(ssh -L $EBM_PORT_DASHBOARD:127.0.0.1:$EBM_PORT_DASHBOARD HEAD), and start Ray with ray[default]" \
    "on the head"
elif ((code)) && grep -q "submission_id $name already exists" "$upload/stderr"; then
  fail "--submission-id: the cluster has had a job $name already; leave it out, or choose another"
fi
cat "$upload/stderr" >&2
[[ -n $wait ]] || exit "$code"
# Ray's own code is 0 for a job that was stopped, and 1 for whatever else did not succeed.
if ! ended=$(ray job status --address "$address" "$name" 2>/dev/null); then
  printf 'error: job %s cannot be asked any more and may go on; look with: %s\n' "$name" \
    "RAY_AUTH_MODE=token ray job logs -f $name --address $address" >&2
  exit 1
elif [[ $ended == *"Job '$name' was stopped"* ]]; then
  exit 75
elif [[ $ended =~ 'failed with exit code '([0-9]+) ]]; then
  exit "${BASH_REMATCH[1]}"
fi
exit "$code"
