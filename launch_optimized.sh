#!/usr/bin/env bash
# Phase 1 with a prepared configuration: ./launch_optimized.sh small|optimized [--set key=value ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/scripts/environment.sh"
case "${1:-}" in
  small) config="$root/config_small.yaml" ;;
  optimized) config="$root/config_optimized.yaml" ;;
  *)
    echo "npt: usage: ./launch_optimized.sh small|optimized [--set key=value ...] (got '${1:-nothing}')" >&2
    exit 2
    ;;
esac
shift
prepare_environment "$root"
exec python "$root/train_npt_optimized.py" --config "$config" "$@"
