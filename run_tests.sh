#!/usr/bin/env bash
# The test suite: ./run_tests.sh [pytest arguments], e.g. ./run_tests.sh -m slow
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/scripts/environment.sh"
prepare_environment "$root" requirements-test.txt
cd "$root"
exec python -m pytest "$@"
