#!/usr/bin/env bash
# Writes the lock files anew: the versions the tests ran with, with hashes, without download addresses.
# cpu.lock holds what every machine installs; cuda12.lock and cuda13.lock hold only what they add to it.
# Flags go to uv: --upgrade for newer versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
resolve() { # FILE FLAGS…: FILE's versions are kept
    .venv/bin/uv pip compile pyproject.toml --group dev --universal --python-version 3.12 --quiet \
        --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o "$@"
}
base=requirements/cpu.lock
all=$(mktemp)
trap 'rm -f "$all"' EXIT
resolve "$base" "$@"
for variant in cuda12 cuda13; do
    cat "$base" "requirements/$variant.lock" >"$all"
    resolve "$all" --extra "$variant" --constraint "$base" "$@"
    # A package is a line that is not indented and the indented lines below it.
    awk 'FNR == NR { in_base[$1]; next } /^[^ ]/ { added = !($1 in in_base) } added' \
        "$base" "$all" >"requirements/$variant.lock"
done
