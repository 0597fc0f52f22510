# shellcheck shell=bash
# Which processes are ours to signal. Sourced, not run.

# Whether $1 is a directory of this user's that nobody else may enter. In /tmp anybody may make one,
# and the numbers in it would be given to `kill`.
is_private() {
  [[ -d $1 && ! -L $1 && -O $1 && $(stat -c %a "$1") =~ ^[0-7]?700$ ]]
}

# When process $1 began, in ticks since the machine did: the same number with another beginning is
# another process.
birth_of() {
  local stat fields
  [[ $1 =~ ^[1-9][0-9]{0,9}$ ]] && { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  # Its name comes second, in parentheses, and may hold anything.
  read -ra fields <<<"${stat##*) }"
  printf '%s' "${fields[19]}"
}

# "PID BIRTH" of the process $1, for `still_runs`.
identity_of() {
  printf '%s %s\n' "$1" "$(birth_of "$1")"
}

# Whether the process of the file $1 is there: sets `pid` if the file holds one, and is false if its
# number is gone or another's by now.
still_runs() {
  local birth text
  pid=
  text=$(head -c 64 "$1" 2>/dev/null) || return 1
  [[ $text =~ ^([1-9][0-9]{0,9})\ ([0-9]+)$ ]] || return 1
  pid=${BASH_REMATCH[1]}
  birth=$(birth_of "$pid") && [[ $birth == "${BASH_REMATCH[2]}" ]]
}
