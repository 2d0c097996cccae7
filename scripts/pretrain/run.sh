#!/usr/bin/env bash
# Makes the embedded model from nothing:
# world -> autoencoder -> small CLIP -> diffusion -> judge -> pack -> examples -> quality.
# Training goes on from its last save, 3 to 7 minutes back; drawing and caching, which are written when they are whole,
# start over. All state lies in pretrain_state/, which git ignores.
#
# ASSETS   the assets folder of the npm package @lobehub/fluent-emoji-3d 1.1.0; empty: fetched with npm, once
# MINUTES_AUTOENCODER, MINUTES_TEXT, MINUTES_DIFFUSION, MINUTES_JUDGE   time budgets, resumed runs included
# PICTURES, PICTURES_JUDGE, SAMPLES   how many are drawn for training, for the judge (2,000 are held out), for the quality
#
# A rehearsal of all stages, in a clone, as it replaces the model that ships:
#   PICTURES=2000 PICTURES_JUDGE=3000 SAMPLES=60 MINUTES_AUTOENCODER=1 MINUTES_TEXT=1 MINUTES_DIFFUSION=1 \
#       MINUTES_JUDGE=1 bash scripts/pretrain/run.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh
state=pretrain_state
mkdir -p "$state"
if [[ -z "${ASSETS:-}" ]]; then
    if [[ ! -d "$state/sprites" ]]; then        # unpacked elsewhere and renamed: what is there is whole
        rm -rf "$state/package"
        (cd "$state" && npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz)
        mv "$state/package/assets" "$state/sprites"
    fi
    ASSETS="$state/sprites"
fi
"$PYTHON" scripts/pretrain/world.py "$ASSETS" --pictures "${PICTURES:-48000}"
"$PYTHON" scripts/pretrain/vocabulary.py
"$PYTHON" scripts/pretrain/autoencoder.py --workers 2 --threads 1 --minutes "${MINUTES_AUTOENCODER:-100}"
"$PYTHON" scripts/pretrain/text_encoder.py --minutes "${MINUTES_TEXT:-20}"
"$PYTHON" scripts/pretrain/diffusion.py --workers 2 --threads 1 --minutes "${MINUTES_DIFFUSION:-260}"
"$PYTHON" scripts/pretrain/judge.py "$ASSETS" --pictures "${PICTURES_JUDGE:-40000}" --workers 2 --threads 1 \
    --minutes "${MINUTES_JUDGE:-65}"
"$PYTHON" scripts/pretrain/pack.py
"$PYTHON" scripts/pretrain/examples.py "$ASSETS"
"$PYTHON" scripts/pretrain/quality.py "$ASSETS" --samples "${SAMPLES:-500}"
