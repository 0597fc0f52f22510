#!/usr/bin/env bash
# Install ebm_dist, pinned, into a new environment: what the images run, and a bare host can.
#
#   docker/install.sh DIRECTORY
#
# From the repository's root. PYTHON is the interpreter (python3), TORCH_INDEX_URL the index that
# torch comes from: https://download.pytorch.org/whl/cpu has the CPU build, PyPI the CUDA build.
set -euo pipefail

if (($# != 1)); then
  printf 'usage: docker/install.sh DIRECTORY\n' >&2
  exit 2
fi
pins=(-c constraints.txt -c docker/constraints.txt)
pip=("$1/bin/python" -m pip --disable-pip-version-check --no-cache-dir install --quiet)
# DeepSpeed's operators are built at first use, if at all; looking for a compiler here would fail.
export DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1

"${PYTHON:-python3}" -m venv "$1"
# torch comes first and alone: its CPU build has its own version, which the rest must not replace.
"${pip[@]}" "${pins[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
# ray[default] has the dashboard, which job submission and KubeRay's probes need.
"${pip[@]}" "${pins[@]}" '.[train]' 'ray[default]'
"$1/bin/python" -m pip --disable-pip-version-check check
"$1/bin/ebm-dist" --help >/dev/null
