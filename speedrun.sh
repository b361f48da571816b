#!/usr/bin/env bash
# From nothing to a model that chats, and its report card, in one command.
#   bash speedrun.sh                     the preset that fits this machine (no GPU: configs/cpu.toml)
#   bash speedrun.sh --preset d20_2025   another one of configs/
#   bash speedrun.sh --plan              only says what it would do and cost
# Finished stages are skipped when it is run again; an interrupted one continues where it stopped.
# NANOCHAT_BASE_DIR names where everything is kept (default ~/.cache/nanochat_jax).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. requirements/prepare.sh

preset='' plan_only=''
while [ $# -gt 0 ]; do
    case "$1" in
        --preset) preset=${2:?--preset needs a name in configs/}; shift 2 ;;
        --preset=*) preset=${1#--preset=}; shift ;;
        --plan) plan_only=1; shift ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) die "unknown argument $1; see bash speedrun.sh --help" ;;
    esac
done
prepare_environment
if [ -z "$preset" ]; then
    if [ "$VARIANT" = cpu ]; then preset=cpu; else preset=speedrun; fi
fi
[ -f "configs/$preset.toml" ] || die "there is no configs/$preset.toml; presets: $(cd configs && echo *.toml | sed 's/\.toml//g')"
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat_jax}
export PYTHONUNBUFFERED=1

done_folder="$NANOCHAT_BASE_DIR/speedrun/$preset"
mkdir -p "$done_folder"

# stage NAME COMMAND…: runs it unless it has finished with this preset before.
stage() {
    local name=$1 mark began=$SECONDS
    shift
    mark="$done_folder/$name.$(cksum <"configs/$preset.toml" | cut -d' ' -f1)"
    if [ -f "$mark" ]; then say "$name: done before, skipped"; return; fi
    say "$name"
    "$PYTHON" "$@"
    echo $((SECONDS - began)) >"$mark"
    say "$name took $((SECONDS - began)) s"
}

say "Preset $preset; everything goes to $NANOCHAT_BASE_DIR"
"$PYTHON" scripts/plan.py --config "$preset" --no-compile
if [ -n "$plan_only" ]; then exit 0; fi

# Whether the preset speaks of a stage.
has() { grep -q "^\[$1\]" "configs/$preset.toml"; }

# train STAGE RUN: a stage that trains. One that was stopped has been saved and ends well too, but it
# is not finished.
train() {
    stage "$1" "scripts/$1.py" --config "$preset" --resume
    local folder="$NANOCHAT_BASE_DIR/runs/$2" planned
    planned=$(sed -n '1s/.*"num_iterations": \([0-9]*\).*/\1/p' "$folder/metrics.jsonl")
    if [ -d "$folder/checkpoints/$planned" ]; then return; fi
    rm -f "$done_folder/$1".*
    say "$1 was stopped; run this again to go on."
    exit 0
}

stage download scripts/download.py --config "$preset"
if has prefetch; then stage prefetch scripts/prefetch.py --config "$preset"; fi
stage tok_train scripts/tok_train.py --config "$preset"
stage tok_eval scripts/tok_eval.py --config "$preset"
train pretrain "$preset"
stage eval_base scripts/eval_base.py --config "$preset"
if has midtrain; then
    train midtrain "$preset-mid"
    stage eval_chat_mid scripts/eval_chat.py --config "$preset" --run "$preset-mid"
fi
train sft "$preset-sft"
stage eval_chat_sft scripts/eval_chat.py --config "$preset" --run "$preset-sft"
train rl "$preset-rl"
stage eval_chat_rl scripts/eval_chat.py --config "$preset" --run "$preset-rl"
"$PYTHON" scripts/report.py "$preset"

say "Finished in $((SECONDS / 60)) min $((SECONDS % 60)) s. Talk to it, here or in a browser:"
say "    $PYTHON scripts/chat.py"
say "    $PYTHON scripts/serve.py"
