# Sourced by the launch scripts: an environment with npt in it, the active one or .venv in the repository.
# Says what it does; on failure prints one line and exits with 1.

fail() { printf 'npt: %s\n' "$1" >&2; exit 1; }

prepare_environment() {
  local root="$1" python
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -f "$root/.venv/bin/activate" ]; then
      python="$(command -v python3 || command -v python)" || fail "no python3 on the PATH; install Python 3.10 or later"
      require_version "$python"
      echo "npt: making $root/.venv"
      "$python" -m venv "$root/.venv" || fail "python -m venv failed; on Debian: apt install python3-venv"
    fi
    # shellcheck disable=SC1091
    . "$root/.venv/bin/activate"
  fi
  require_version python
  if ! python -c 'import npt, pytest' 2>/dev/null; then
    echo "npt: installing the pinned dependencies into $VIRTUAL_ENV (a few minutes)"
    install_torch "$root"
    # From the root: pip reads the requirements' -e . from where it runs.
    (cd "$root" && python -m pip install --quiet -r requirements.txt) \
      || fail "pip could not install requirements.txt; check the network and the free disk space"
  fi
}

require_version() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || fail "$("$1" --version 2>&1) in ${VIRTUAL_ENV:-the PATH} is too old; npt needs Python 3.10 or later"
}

install_torch() {
  local version
  python -c 'import torch' 2>/dev/null && return
  version="$(sed -n 's/^torch==//p' "$1/constraints.txt")"
  if command -v nvidia-smi >/dev/null || [ "$(uname -s)" != Linux ]; then
    python -m pip install --quiet "torch==$version" || fail "pip could not install torch==$version; check the network and the disk"
  else
    # No GPU: the CPU build, 0.2 GB instead of several; the plain index where PyTorch's own can't be reached.
    python -m pip install --quiet --retries 1 "torch==$version" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
      || python -m pip install --quiet "torch==$version" || fail "pip could not install torch==$version; check the network and the disk"
  fi
}
