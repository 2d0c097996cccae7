#!/usr/bin/env bash
# Draws a concept, fine-tuned alone and with DCI. Untouched: a prompts file with the newest concept under logs/, as one
# sheet. Every variable can also be set from outside (PROMPT="a {} in space" bash inference.sh); further options follow
# the command.
set -euo pipefail

CKPT="${CKPT:-}"                      # sd-v1-4.ckpt or .safetensors; empty: the embedded model
CONCEPT="${CONCEPT:-}"                # concept file; empty: the newest under logs/
PROMPT="${PROMPT:-}"                  # one prompt, {} for the concept; empty: the prompts file
PROMPTS="${PROMPTS:-configs/prompts/tiny.txt}"   # one prompt per line
LAMBDAS="${LAMBDAS:-}"                # injection strengths, e.g. "0 1 1.5"; more injects more of the context
OUTDIR="${OUTDIR:-}"                  # empty: outputs/<name of the run>

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here"
source scripts/environment.sh

if [[ -z "$CONCEPT" ]]; then
    CONCEPT="$(ls -t logs/*/checkpoints/step-*.safetensors 2>/dev/null | head -n 1 || true)"
    if [[ -z "$CONCEPT" ]]; then
        echo "error: there is no concept under logs/; teach one first with: bash train.sh" >&2
        exit 1
    fi
fi
[[ -n "$OUTDIR" ]] || OUTDIR="outputs/$(basename "$(dirname "$(dirname "$CONCEPT")")")"

arguments=(--delta_ckpt "$CONCEPT" --outdir "$OUTDIR")
[[ -n "$CKPT" ]] && arguments+=(-b configs/model/sd-v1.yaml configs/sample/paper.yaml --ckpt "$CKPT")
if [[ -n "$PROMPT" ]]; then arguments+=(--prompt "$PROMPT"); else arguments+=(--from-file "$PROMPTS"); fi
# shellcheck disable=SC2206
[[ -n "$LAMBDAS" ]] && arguments+=(--agg_lambda $LAMBDAS)

echo "+ python$(printf ' %q' scripts/sample.py "${arguments[@]}" "$@")"
"$PYTHON" scripts/sample.py "${arguments[@]}" "$@"
again="${CKPT:+CKPT=$(printf '%q' "$CKPT") }CONCEPT=$(printf '%q' "$CONCEPT")$(printf ' %q' bash inference.sh "$@")"
echo "next:     PROMPT=\"a {} in the forest\" $again   (or another concept: bash train.sh -b configs/model/tiny.yaml configs/method/ico_for_dci.yaml configs/method/tiny.yaml configs/concept/striped_cat.yaml)"
