#!/usr/bin/env bash
# Runs every check: Rust format, lints and tests; Python lints, types and tests with warnings as errors.
#   bash test.sh                 everything that needs no GPU
#   bash test.sh tests/test_gpt.py -k causal     only these Python tests
#   bash test.sh --gpu-compile   compiles the GPU program without a GPU and guards its counts (installs cuda13)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${1:-}" = --gpu-compile ]; then VARIANT=cuda13; fi
. requirements/prepare.sh
prepare_environment

if [ "${1:-}" = --gpu-compile ]; then
    shift
    exec "$PYTHON" -m pytest -m gpu_compile --timeout 900 "$@"
fi
if [ $# -gt 0 ]; then exec "$PYTHON" -m pytest "$@"; fi

say "Rust: format, lints, tests"
(
    cd rustbpe
    cargo fmt --check
    # With the border to Python, which the tests do without.
    PYO3_PYTHON="$PYTHON" cargo clippy --release --quiet --all-targets --all-features -- -D warnings
    cargo test --release --quiet
)
say "Python: lints, types"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
say "Python: tests"
# Two at a time: most of their time is compiling, which uses one core.
"$PYTHON" -m pytest -m "not gpu and not gpu_compile" -n 2 --dist loadfile
