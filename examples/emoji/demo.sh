#!/bin/sh
# Compile the example for this CPU, check it, make a picture with each task. Environment: BIN, MODEL, OUT.
set -eu
MTU="$BIN/mtu-compile"
mkdir -p "$OUT"
"$MTU" build "$MODEL" --target cpu --int8 --force -o "$OUT/bundle"
"$MTU" report "$OUT/bundle" --force -o "$OUT/report.html"
# A prompt, held-out rows from the middle of each task's ranking, and the hole it fills worst (publish.py).
"$MTU" run "$OUT/bundle" --batch examples/emoji/demo/requests.json -o "$OUT/pictures"
echo
echo "pictures: $OUT/pictures"
echo "report:   $OUT/report.html"
