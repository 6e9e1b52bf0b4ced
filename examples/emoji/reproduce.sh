#!/bin/sh
# From nothing to the committed checkpoint; every step resumes. Environment: BIN, optionally WORK, GPU=1 (one data-centre
# GPU, twice nine minutes: what made the committed checkpoint) and, without it, the step counts.
set -eu
WORK="${WORK:-build/emoji}"
PY="$BIN/python"
MTU="$BIN/mtu-compile"

if [ "${GPU:-0}" = 1 ]; then
    [ -f "$WORK/mtu/model_index.json" ] ||
        "$PY" -m examples.emoji.train_gpu --work "$WORK" --cache "$WORK" --minutes "${MINUTES:-8.9}" --compile vae
    [ -f "$WORK/further/model_index.json" ] ||
        "$PY" -m examples.emoji.train_further --start "$WORK/mtu" --work "$WORK" --cache "$WORK" --minutes "${MINUTES:-9.2}"
    [ -f "$WORK/clip.safetensors" ] || "$PY" -m examples.emoji.score_clip train --work "$WORK" --cache "$WORK"
else
    [ -f "$WORK/vae/config.json" ] ||
        "$PY" -m examples.emoji.train_vae --work "$WORK" --cache "$WORK" --steps "${VAE_STEPS:-2400}"
    [ -f "$WORK/base/model_index.json" ] ||
        "$PY" -m examples.emoji.train_base --work "$WORK" --cache "$WORK" --steps "${BASE_STEPS:-3300}"
fi
[ -f "$WORK/train/t2i/metadata.jsonl" ] || "$PY" -m examples.emoji.make_tasks --work "$WORK" --cache "$WORK"
[ -d "$WORK/mtu" ] || [ -d "$WORK/mtu-start" ] ||
    "$MTU" upcycle "$WORK/base" -o "$WORK/mtu-start" --tasks examples/emoji/tasks.json --experts 4 --d-task 64 --router-width 64
[ -d "$WORK/mtu" ] || "$MTU" train "$WORK/mtu-start" --data "$WORK/train" -o "$WORK/mtu" --steps "${MTU_STEPS:-1300}" \
    --batch-size 12 --learning-rate 1e-3 --ema 0.998 --mixed-precision bf16 --mask-variants 6 \
    --save-every 200 --save-dtype float16 --resume
MODEL="$WORK/mtu"
[ "${GPU:-0}" != 1 ] || MODEL="$WORK/further"
"$PY" -m examples.emoji.publish --work "$WORK" --model "$MODEL"
