#!/bin/sh
# Compile the example for this CPU, check it, make a picture with each task. Environment: BIN, MODEL, OUT.
set -eu
MTU="$BIN/mtu-compile"
D=examples/emoji/demo
mkdir -p "$OUT"
"$MTU" build "$MODEL" --target cpu --int8 --force -o "$OUT/bundle"
"$MTU" report "$OUT/bundle" --force -o "$OUT/report.html"
"$MTU" run "$OUT/bundle" --task t2i --prompt "red apple" --seed 1 -o "$OUT/t2i.png"
"$MTU" run "$OUT/bundle" --task edit --image "$D/edit.png" --prompt "make it dark skin tone" -o "$OUT/edit.png"
"$MTU" run "$OUT/bundle" --task sr --image "$D/small.png" -o "$OUT/sr.png"
"$MTU" run "$OUT/bundle" --task inpaint --image "$D/inpaint.png" --mask "$D/mask.png" \
    --prompt "grimacing face" -o "$OUT/inpaint.png"
echo
echo "pictures: $OUT/t2i.png $OUT/edit.png $OUT/sr.png $OUT/inpaint.png"
echo "report:   $OUT/report.html"
