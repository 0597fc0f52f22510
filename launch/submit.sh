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
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

address="http://127.0.0.1:$EBM_PORT_DASHBOARD"
run_dir=
config=
overrides=()
options=()
while (($#)); do
  case $1 in
    --run-dir | --address | --submission-id)
      (($# > 1)) || fail "$1: expected a value"
      case $1 in
        --run-dir) run_dir=$2 ;;
        --address) address=$2 ;;
        --submission-id) options+=(--submission-id "$2") ;;
      esac
      shift 2
      ;;
    --no-wait)
      options+=(--no-wait)
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

# Ray uploads a whole directory; this one holds the config and nothing else.
upload=$(mktemp -d)
trap 'rm -rf "$upload"' EXIT
cp "$config" "$upload/config.yaml"
# An address of this machine's own would be taken for the cluster's.
unset RAY_ADDRESS
ray job submit --address "$address" --working-dir "$upload" "${options[@]}" -- \
  ebm-dist train config.yaml "${overrides[@]}" --run-dir "$run_dir" --resume auto
