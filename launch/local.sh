#!/usr/bin/env bash
# A Ray on this machine that outlives one run, and by hand on a few machines.
#
#   launch/local.sh start [--host ADDRESS] [RAY START OPTION...]       head, on loopback by default
#   launch/local.sh join HEAD[:PORT] --host ADDRESS [RAY START OPTION...]
#   launch/local.sh train CONFIG [KEY=VALUE...] [--run-dir DIR]        a run on that Ray
#   launch/local.sh status | stop | token
#
# One run on one machine needs none of it: `ebm-dist train CONFIG` starts a Ray of its own.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/processes.sh
source "$here/processes.sh"

state="${EBM_DIST_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/ebm_dist}"
start_patience=60

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

# Sets `pid`. After a restart of the machine the number may be another process's.
running() {
  still_runs "$state/ray.pid"
}

# Sets `temp_dir` to where this Ray keeps its sessions. Its own directories and the sockets in them are
# writable by everybody, so they lie where nobody else can enter; ebm_dist/cluster/ray_temp.py does so too.
choose_temp_dir() {
  local root=${RAY_TMPDIR:-${TMPDIR:-/tmp}} private
  local below=/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store
  private=$root
  if ! is_private "$root"; then
    private=$root/ebm_dist-$UID
    (umask 077 && mkdir "$private") 2>/dev/null || true
    # What others could only read is made private; where they could write, they may have.
    if [[ -d $private && ! -L $private && -O $private ]] &&
      ((!(8#$(stat -c %a "$private") & 8#22))); then
      chmod 700 "$private"
    fi
    is_private "$private" ||
      fail "$private: expected a directory of this user with mode 700; remove it, or set RAY_TMPDIR"
  fi
  if ((${#private} + ${#below} > 107)); then
    fail "$root is too long for the sockets of Ray; set RAY_TMPDIR to a shorter directory, such as /tmp"
  fi
  temp_dir=$private/ray
}

# `ray start` in the background; $1 is the address that it must answer at, the rest its arguments.
launch_ray() {
  local address=$1 pid deadline
  shift
  running && fail "a Ray started here runs already (process $pid); launch/local.sh stop"
  choose_temp_dir
  (umask 077 && mkdir -p "$state")
  # A session of its own, so that closing the terminal does not take it along. --block makes one
  # process the owner of all of them: `ray stop` would end every other Ray of this user as well.
  setsid ray start --block --disable-usage-stats --temp-dir="$temp_dir" "${EBM_RAY_STORE[@]}" \
    "$@" "${EBM_RAY_PORTS[@]}" \
    </dev/null >"$state/ray.log" 2>&1 &
  pid=$!
  identity_of "$pid" >"$state/ray.pid"
  printf '%s\n' "$address" >"$state/ray.address"
  deadline=$((SECONDS + start_patience))
  until grep -q 'Ray runtime started' "$state/ray.log"; do
    if ! kill -0 "$pid" 2>/dev/null || ((SECONDS >= deadline)); then
      tail -n 5 "$state/ray.log" >&2
      stop_ray
      fail "Ray did not start; log: $state/ray.log"
    fi
    sleep 0.2
  done
}

stop_ray() {
  local pid deadline
  if running; then
    kill -TERM "$pid"
    deadline=$((SECONDS + 20))
    while running; do
      ((SECONDS < deadline)) || kill -KILL -- "-$pid" 2>/dev/null || true
      sleep 0.2
    done
  fi
  rm -f "$state/ray.pid" "$state/ray.address"
}

# Sets `host` and `rest` from the arguments.
parse_host() {
  host=127.0.0.1
  rest=()
  while (($#)); do
    case $1 in
      --host)
        (($# > 1)) || fail "--host: expected an address of this machine"
        host=$2
        shift 2
        ;;
      --host=*)
        host=${1#*=}
        shift
        ;;
      *)
        rest+=("$1")
        shift
        ;;
    esac
  done
}

start_head() {
  parse_host "$@"
  need ray
  if is_loopback "$host" && [[ -z ${RAY_AUTH_TOKEN:-} && ! -e $(token_file) ]]; then
    make_token
  fi
  require_token
  # The dashboard runs any code that it is sent; from elsewhere it is reached through ssh -L.
  launch_ray "$host:$EBM_PORT_GCS" --head --node-ip-address="$host" --port="$EBM_PORT_GCS" \
    --dashboard-host=127.0.0.1 --dashboard-port="$EBM_PORT_DASHBOARD" "${rest[@]}"
  printf 'Ray head at %s:%s, dashboard at http://127.0.0.1:%s\n' \
    "$host" "$EBM_PORT_GCS" "$EBM_PORT_DASHBOARD"
  printf 'next: launch/local.sh train configs/digits.yaml\n'
}

join_head() {
  (($#)) || fail "join: expected HEAD[:PORT]"
  local head=$1
  shift
  [[ $head == *:* ]] || head+=":$EBM_PORT_GCS"
  parse_host "$@"
  if is_loopback "$host"; then
    fail "--host: expected the address under which the head reaches this machine, got $host"
  fi
  need ray
  require_token
  launch_ray "$head" --address="$head" --node-ip-address="$host" "${rest[@]}"
  printf 'joined %s as %s\n' "$head" "$host"
}

train() {
  (($#)) || fail "train: expected CONFIG [KEY=VALUE...]"
  running || fail "no Ray was started here; launch/local.sh start"
  need ebm-dist
  require_token
  RAY_ADDRESS=$(<"$state/ray.address") exec ebm-dist train "$@"
}

case ${1:-} in
  start)
    shift
    start_head "$@"
    ;;
  join)
    shift
    join_head "$@"
    ;;
  train)
    shift
    train "$@"
    ;;
  status)
    running || fail "no Ray was started here; launch/local.sh start"
    require_token
    exec ray status --address "$(<"$state/ray.address")"
    ;;
  stop)
    stop_ray
    ;;
  token)
    [[ ! -e $(token_file) ]] || fail "$(token_file) exists already"
    make_token
    printf 'wrote %s\n' "$(token_file)"
    ;;
  -h | --help)
    usage
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
