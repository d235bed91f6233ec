# Sourced by the launch scripts: an environment with npt in it, the active one or .venv in the repository.
# prepare_environment ROOT [requirements.txt | requirements-test.txt]. Says what it does; on failure prints one line and exits with 1. Running it again does nothing that is done.

fail() { printf 'npt: %s\n' "$1" >&2; exit 1; }
say() { printf 'npt: %s\n' "$1"; }

prepare_environment() {
  local root="$1" file="${2:-requirements.txt}" probe="import npt" stamp wanted
  [ "$file" = requirements.txt ] || probe="import npt, pytest"
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -f "$root/.venv/bin/activate" ] || make_environment "$root"
    # shellcheck disable=SC1091
    . "$root/.venv/bin/activate"
  fi
  require_version python || fail "$(python --version 2>&1) in $VIRTUAL_ENV is too old; npt needs Python 3.10 or later"
  # What is installed is recorded, so that another clone, or new pins after a pull, are noticed.
  stamp="$VIRTUAL_ENV/npt-installed-${file%.txt}"
  wanted="$(wanted_of "$root" "$file")"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || ! python -c "$probe" 2>/dev/null; then
    require_space "$root"
    remove_earlier_name
    install_torch "$root"
    say "installing the pinned dependencies of $file into $VIRTUAL_ENV (1 to 3 minutes)"
    # From the root: pip reads the requirements' -e . from where it runs.
    (cd "$root" && pip_install -r "$file") || fail "$(reason)"
    printf '%s' "$wanted" >"$stamp"
  fi
}

wanted_of() { printf '%s' "$(cat "$1/pyproject.toml" "$1/constraints.txt" "$1/$2" | cksum) $1"; }

make_environment() {
  local candidate python=""
  for candidate in ${PYTHON:-} python3 python python3.13 python3.12 python3.11 python3.10; do
    if command -v "$candidate" >/dev/null && require_version "$candidate"; then python="$candidate"; break; fi
  done
  [ -n "$python" ] || fail "npt needs Python 3.10 or later, and found $(found_versions); install one, or name it: PYTHON=/path/to/python $0"
  require_space "$1"
  say "making $1/.venv with $("$python" --version 2>&1)"
  if ! "$python" -m venv "$1/.venv" >/dev/null; then
    rm -rf "$1/.venv"
    fail "$python -m venv $1/.venv failed, see above; on Debian and Ubuntu: apt install python3-venv"
  fi
}

require_version() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

found_versions() {
  local candidate names=""
  for candidate in python3 python; do
    command -v "$candidate" >/dev/null && names="$names $candidate ($("$candidate" --version 2>&1))"
  done
  printf '%s' "${names:- none on the PATH}" | sed 's/^ //'
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }

# About 2 GB without CUDA, 9 GB with it.
require_space() {
  local target="${VIRTUAL_ENV:-$1}" need=3 free
  has_gpu && need=10
  free="$(df -Pk "$target" | awk 'NR == 2 { print int($4 / 1048576) }')"
  [ "$free" -ge "$need" ] || fail "the disk is too full: $free GB free at $target, and the dependencies need about $need GB; make room"
}

# This package was once installed under the name npt, and would own the command of that name beside neuroplastic.
remove_earlier_name() {
  local ours="import importlib.metadata as m, sys; sys.exit('npt.cli:console_main' not in [e.value for e in m.distribution('npt').entry_points])"
  if python -c "$ours" 2>/dev/null; then
    say "removing this package's installation under its earlier name, npt"
    python -m pip uninstall --disable-pip-version-check -q -y npt || fail "pip uninstall npt failed, see above"
  fi
}

# What pip does, without what is there already; its complaints are kept for `reason`.
pip_install() {
  PIP_LOG="${TMPDIR:-/tmp}/npt-install-$$.log"
  python -m pip install --disable-pip-version-check --progress-bar off "$@" 2>"$PIP_LOG" \
    | awk '/^(Collecting|Installing|Successfully)|^ *(Downloading|Using cached) .*\(.* [MG]B\)/ { sub(/ \(from .*/, ""); print "  " substr($0, 1, 110); fflush() }'
  [ "${PIPESTATUS[0]}" -eq 0 ]
}

# One line for what pip complained about.
reason() {
  if grep -q 'No space left' "$PIP_LOG"; then
    echo "the disk is full: make room in $VIRTUAL_ENV and in ${TMPDIR:-/tmp}, then run this again"
  elif grep -Eqi 'connection|name resolution|timed out|proxy|SSL|No matching distribution' "$PIP_LOG"; then
    echo "pip could not reach the package registry, or it lacks a version; check the network, a proxy or pip's index, then run this again (log: $PIP_LOG)"
  else
    echo "pip failed: $(grep -i error "$PIP_LOG" | head -1 | cut -c1-200) (log: $PIP_LOG)"
  fi
}

install_torch() {
  local version
  python -c 'import torch' 2>/dev/null && return
  version="$(sed -n 's/^torch==//p' "$1/constraints.txt")"
  if has_gpu || [ "$(uname -s)" != Linux ]; then
    say "installing torch $version$(has_gpu && echo ' with CUDA, several GB' || true)"
    pip_install "torch==$version" || fail "$(reason)"
  else
    say "installing torch $version for the CPU, 0.2 GB: no GPU here"
    # PyTorch's own index has the CPU build; the plain one where that can't be reached.
    pip_install --retries 1 "torch==$version" --index-url https://download.pytorch.org/whl/cpu \
      || pip_install "torch==$version" || fail "$(reason)"
  fi
}
