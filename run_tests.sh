#!/usr/bin/env bash
# The test suite: ./run_tests.sh [pytest arguments], e.g. ./run_tests.sh -m slow
# Two processes of one thread each: small tensors gain nothing from threads. NPT_TEST_WORKERS=0 runs it in one.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/scripts/environment.sh"
prepare_environment "$root" requirements-test.txt
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n "${NPT_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
