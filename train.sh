#!/usr/bin/env bash
# Trains the model on one concept. Untouched: the embedded example on the embedded model, on a CPU, in minutes. Every
# variable can also be set from outside (CLASS_NOUN="teddy bear" bash train.sh); further options follow the command.
#
# For Stable Diffusion v1.4 set CKPT, DATAPATH and CLASS_NOUN (and REG_DATAPATH, recommended).
set -euo pipefail

CKPT="${CKPT:-}"                      # sd-v1-4.ckpt or .safetensors; empty: the embedded model
DATAPATH="${DATAPATH:-}"              # folder with 3 to 10 photos of one thing; empty: the embedded example
CLASS_NOUN="${CLASS_NOUN:-}"          # what it is: "cat", "tortoise plushy"
REG_DATAPATH="${REG_DATAPATH:-}"      # real_reg/samples_<class>, or any folder of images of the class
REG_MODE="${REG_MODE:-}"              # folder, generate or none (real_reg/README.md); empty: the folder, if any
NAME="${NAME:-}"                      # name of the run; empty: the concept's
METHOD="${METHOD:-}"                  # configs/method/*.yaml; empty: ICO with the words DCI wants (p = 1, n = 3, s = 1)

# Paths mean the folder this is called from; the repository's own files are found from anywhere.
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/"
[[ "$here" -ef . ]] && here=""
source "${here}scripts/environment.sh"

arguments=()
if [[ -n "$CKPT" ]]; then
    arguments+=(-b configs/sd-v1.yaml ${METHOD:+"$METHOD"} --ckpt "$CKPT")
elif [[ -n "$METHOD" ]]; then
    arguments+=(-b configs/tiny.yaml "$METHOD" configs/method/tiny.yaml)
fi
[[ -n "$DATAPATH" ]] && arguments+=(--datapath "$DATAPATH")
[[ -n "$CLASS_NOUN" ]] && arguments+=(--class_noun "$CLASS_NOUN")
[[ -n "$REG_DATAPATH" ]] && arguments+=(--reg_datapath "$REG_DATAPATH")
[[ -n "$REG_MODE" ]] && arguments+=(--reg_mode "$REG_MODE")
[[ -n "$NAME" ]] && arguments+=(--name "$NAME")

echo "+ python$(printf ' %q' "${here}scripts/train.py" ${arguments[@]+"${arguments[@]}"} "$@")"
exec "$PYTHON" "${here}scripts/train.py" ${arguments[@]+"${arguments[@]}"} "$@"
