# Prepares .venv for speedrun.sh and test.sh, which source this file; does nothing when it is ready.
# Sets PYTHON to the environment's interpreter. VARIANT: cpu, cuda12 or cuda13 (default: what the machine has).

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

detect_variant() {
    command -v nvidia-smi >/dev/null 2>&1 || { echo cpu; return; }
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
    case "$driver" in
        '' | *[!0-9]*) echo cpu ;;
        *) if [ "$driver" -ge 580 ]; then echo cuda13; else echo cuda12; fi ;;
    esac
}

# The first interpreter that runs and is new enough; a name on PATH may be a shim for nothing.
find_python() {
    local candidate
    for candidate in python3 python3.12 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    if python=$(find_python) && "$python" -m venv .venv >/dev/null 2>&1; then return; fi
    rm -rf .venv
    command -v uv >/dev/null 2>&1 && uv venv --quiet --python 3.12 .venv && return
    die "no Python 3.12 or newer with venv was found; install one (for example: apt install python3-venv, or https://docs.astral.sh/uv) and run this again"
}

# Sets INSTALL to uv where it can be had, else to pip.
choose_installer() {
    if command -v uv >/dev/null 2>&1; then
        INSTALL=(uv pip install --quiet --python "$PYTHON")
    elif "$PYTHON" -m uv --version >/dev/null 2>&1 || "$PYTHON" -m pip install --quiet uv >/dev/null 2>&1; then
        INSTALL=("$PYTHON" -m uv pip install --quiet)
    else
        INSTALL=("$PYTHON" -m pip install --quiet)
    fi
}

# What the environment was made from; a change of any of it makes it again.
fingerprint() {
    { echo "$VARIANT"; cat pyproject.toml "${LOCKS[@]}" rustbpe/Cargo.* rustbpe/src/*.rs; } | cksum
}

prepare_environment() {
    VARIANT=${VARIANT:-$(detect_variant)}
    PYTHON="$PWD/.venv/bin/python"
    [ -f "requirements/$VARIANT.lock" ] || die "VARIANT=$VARIANT is not one of cpu, cuda12, cuda13"
    LOCKS=(requirements/cpu.lock)
    [ "$VARIANT" = cpu ] || LOCKS+=("requirements/$VARIANT.lock") # holds only what is added
    if [ -x "$PYTHON" ] && [ "$(cat .venv/fingerprint 2>/dev/null)" = "$(fingerprint)" ]; then return; fi
    command -v cargo >/dev/null 2>&1 ||
        die "cargo (Rust) is needed to build the tokenizer trainer; get it with: curl https://sh.rustup.rs -sSf | sh -s -- -y"
    say "Preparing .venv ($VARIANT)"
    [ -x "$PYTHON" ] || make_venv
    choose_installer
    "${INSTALL[@]}" "${LOCKS[@]/#/-r}" || die "installing ${LOCKS[*]} failed; see above"
    "${INSTALL[@]}" --no-deps --no-build-isolation -e . || die "building rustbpe failed; see above"
    fingerprint >.venv/fingerprint
}
