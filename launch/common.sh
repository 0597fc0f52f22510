# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that source this use the variables
# What every way of starting Ray shares: ports, health checks, the token. Sourced, not run.

# Pinned, so that a firewall between the nodes can be written down. docs/clusters/README.md has the
# table; the manifests repeat the numbers and a test holds them together.
EBM_PORT_GCS=6379
EBM_PORT_DASHBOARD=8265
EBM_PORT_LEARNERS=6384
EBM_RAY_PORTS=(
  --node-manager-port=6380
  --object-manager-port=6381
  --runtime-env-agent-port=6382
  --dashboard-agent-grpc-port=6383
  --dashboard-agent-listen-port=52365
  --metrics-export-port=8080
  --min-worker-port=10100
  --max-worker-port=10999
)

# Ray's objects get half of this machine's shared memory, the chains the rest. By itself Ray takes 30%
# of the memory, and where /dev/shm has less, in a container above all, puts its objects on disk.
EBM_RAY_STORE=()
ebm_store=$(($(stat -f -c '%b * %S / 2' /dev/shm 2>/dev/null || echo 0)))
if ((ebm_store > 80 << 20)); then # Ray takes no less
  EBM_RAY_STORE=("--object-store-memory=$ebm_store")
fi

# A node that falls silent is given up after about 37 s; Ray's own values take 63 s. Shorter would end
# a node whose cable was out for 20 s: TCP doubles its pauses, so that one speaks again only after up
# to 26 s, and a node once given up does not come back. The last value is how long a server keeps a
# silent connection: by Ray's 20 s it would forget a client that still waits for its answer. Every
# node and driver needs the same four values.
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=1000
export RAY_health_check_failure_threshold=18
export RAY_grpc_keepalive_timeout_ms=60000
export RAY_USAGE_STATS_ENABLED=0
# Ray runs actors at niceness 15: beside any other program they would get its leavings.
export RAY_worker_niceness=0
# By Ray's 60 s a process that imports Ray from a slow network disk is ended, and begins anew.
export RAY_worker_register_timeout_seconds="${RAY_worker_register_timeout_seconds:-300}"
# Ray kills a stopped job after 3 s by default; a checkpoint may take longer.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-120}"

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

need() {
  command -v "$1" >/dev/null || fail "$1 is not on PATH; activate the environment that holds ebm_dist"
}

is_loopback() {
  # A name such as 127.0.0.1.example.com leads anywhere.
  local octet='(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])'
  [[ $1 == localhost || $1 == ::1 || $1 =~ ^127(\.$octet){3}$ ]]
}

# The file Ray would read the token from.
token_file() {
  printf '%s' "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
}

# Where the token that is shown comes from.
token_name() {
  if [[ -n ${RAY_AUTH_TOKEN:-} ]]; then printf RAY_AUTH_TOKEN; else token_file; fi
}

make_token() {
  local file
  file=$(token_file)
  # `ray get-auth-token --generate` leaves the file readable to everybody under the usual umask.
  (
    umask 077
    mkdir -p "$(dirname "$file")"
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$file"
  )
}

# Whoever reaches an open Ray runs any code as this user, so there is no start without a token.
require_token() {
  local file mode
  if [[ ${RAY_AUTH_MODE:-token} != token ]]; then
    fail "RAY_AUTH_MODE: expected token, got ${RAY_AUTH_MODE}; unset it"
  fi
  export RAY_AUTH_MODE=token
  [[ -z ${RAY_AUTH_TOKEN:-} ]] || return 0
  file=$(token_file)
  if [[ ! -s $file ]]; then
    fail "no token: $file is missing or empty; create it once (launch/local.sh token), copy it to" \
      "every machine of the cluster, or set RAY_AUTH_TOKEN_PATH"
  fi
  mode=$(stat -c %a "$file")
  if [[ $mode != *00 ]]; then
    fail "$file: others may read it (mode $mode); chmod 600 it"
  fi
}
