#!/bin/sh
# From nothing to the committed checkpoint; every step resumes. Environment: BIN, optionally WORK and the step counts.
set -eu
WORK="${WORK:-build/emoji}"
PY="$BIN/python"
[ -f "$WORK/vae/config.json" ] || "$PY" -m examples.emoji.train_vae --work "$WORK" --steps "${VAE_STEPS:-2400}"
[ -f "$WORK/base/model_index.json" ] || "$PY" -m examples.emoji.train_base --work "$WORK" --steps "${BASE_STEPS:-5000}"
[ -f "$WORK/train/t2i/metadata.jsonl" ] || "$PY" -m examples.emoji.make_tasks --work "$WORK"
[ -d "$WORK/mtu-start" ] || "$BIN/mtu-compile" upcycle "$WORK/base" -o "$WORK/mtu-start" --tasks examples/emoji/tasks.json \
    --experts 4 --d-task 64 --router-width 64
"$BIN/mtu-compile" train "$WORK/mtu-start" --data "$WORK/train" -o "$WORK/mtu" --steps "${MTU_STEPS:-3000}" --resume
"$PY" -m examples.emoji.publish --work "$WORK"
