#!/usr/bin/env bash
# Writes the three lock files anew: the versions the tests ran with, with hashes, without download addresses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock() {
    .venv/bin/uv pip compile pyproject.toml --group dev --universal --python-version 3.12 --quiet \
        --generate-hashes --no-emit-index-url --no-emit-find-links --no-header "${@:2}" -o "requirements/$1.lock"
}
lock cpu "$@"
lock cuda12 --extra cuda12 "$@"
lock cuda13 --extra cuda13 "$@"
