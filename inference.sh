#!/usr/bin/env bash
# Draws a concept, fine-tuned alone and with DCI. Untouched: a prompts file with the newest concept under logs/, as one
# sheet. Every variable can also be set from outside (PROMPT="a {} in space" bash inference.sh); further options follow
# the command.
set -euo pipefail

CKPT="${CKPT:-}"                      # sd-v1-4.ckpt or .safetensors; empty: the embedded model
CONCEPT="${CONCEPT:-}"                # concept file; empty: the newest one anywhere under logs/
PROMPT="${PROMPT:-}"                  # one prompt, {} for the concept; empty: the prompts file
PROMPTS="${PROMPTS:-configs/prompts/tiny.txt}"   # one prompt per line
LAMBDAS="${LAMBDAS:-}"                # injection strengths, e.g. "0 1 1.5"; more injects more of the context
OUTDIR="${OUTDIR:-}"                  # empty: outputs/<name of the run, or of a concept file that lies elsewhere>

# Paths mean the folder this is called from; the repository's own files are found from anywhere.
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/"
[[ "$here" -ef . ]] && here=""
source "${here}scripts/environment.sh"
train="bash $(printf '%q' "${here}train.sh")"

if [[ -z "$CONCEPT" ]]; then
    CONCEPT="$(find -L logs -path '*/checkpoints/step-*.safetensors' -exec ls -t {} + 2>/dev/null | head -n 1 || true)"
    if [[ -z "$CONCEPT" ]]; then
        echo "error: there is no concept under '$PWD/logs'; give CONCEPT=FILE, or train one first with: $train" >&2
        exit 1
    fi
    echo "concept:  $CONCEPT (the newest under logs/; CONCEPT=FILE draws another)"
fi
if [[ -z "$OUTDIR" ]]; then
    folder="$(dirname -- "$CONCEPT")"
    [[ "$folder" == /* ]] || folder="$PWD/$folder"
    name="$(basename -- "${CONCEPT%.*}")"
    [[ "$folder" == */checkpoints ]] && name="$(basename -- "$(dirname -- "$folder")")"
    OUTDIR="outputs/$name"
fi

arguments=(--delta_ckpt "$CONCEPT" --outdir "$OUTDIR")
[[ -n "$CKPT" ]] && arguments+=(-b configs/sample-sd-v1.yaml --ckpt "$CKPT")
if [[ -n "$PROMPT" ]]; then arguments+=(--prompt "$PROMPT"); else arguments+=(--from-file "$PROMPTS"); fi
read -ra strengths <<< "$LAMBDAS"
[[ -n "${strengths[*]-}" ]] && arguments+=(--agg_lambda "${strengths[@]}")

echo "+ python$(printf ' %q' "${here}scripts/sample.py" "${arguments[@]}" "$@")"
"$PYTHON" "${here}scripts/sample.py" "${arguments[@]}" "$@"

# What has not been tried yet: a prompt of one's own, more strengths for it, what DCI does inside.
again="${CKPT:+CKPT=$(printf '%q' "$CKPT") }CONCEPT=$(printf '%q' "$CONCEPT")$(printf ' %q' bash "${here}inference.sh" "$@")"
same="PROMPT=$(printf '%q' "$PROMPT")"
if [[ -z "$PROMPT" ]]; then
    echo "next:     PROMPT=\"a {} in the forest\" $again"
    example=striped_cat
    [[ "$CONCEPT" == *"$example"* ]] && example=checkered_car
    [[ -n "$CKPT" ]] || echo "or:       $train -b configs/tiny.yaml configs/concept/brick_wall/$example.yaml"
elif [[ -z "$LAMBDAS" ]]; then
    echo "next:     $same LAMBDAS=\"-1 0 1 2\" $again"
elif [[ " $* " != *" --save"[-_]"masks "* ]]; then
    echo "next:     $same LAMBDAS=\"$LAMBDAS\" $again --save_masks"
fi
