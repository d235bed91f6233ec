#!/usr/bin/env bash
# Phase 1 in one command: ./launch_training.sh [--config FILE] [--set key=value ...] [--resume]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/scripts/environment.sh"
prepare_environment "$root"
exec python "$root/train_npt_equivalence.py" "$@"
