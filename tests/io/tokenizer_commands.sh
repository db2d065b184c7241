#!/bin/sh
# usage: tokenizer_commands.sh PROGRAM SOURCE
# The commands of PROGRAM with a tokenizer.json: it goes where the model goes, and what does not
# belong together is refused with exit status 2.
set -eu
program=$1
fixtures=$2/tests/fixtures/tokenizer
work=$(mktemp -d)
trap 'status=$?; rm -rf "$work"; [ $status = 0 ] || echo "failed: $step"' EXIT
cd "$work"
for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do cat "$2/LICENSE"; done > text.txt

train() {
  "$program" train --data text.txt --device cpu --mixers LRU,attn --d-model 16 --d-state 8 \
    --seqlen 32 --batch 4 "$@"
}
prompt='the Software'
generate() {
  "$program" generate --device cpu --temperature 0 --max-new-tokens 12 "$@"
}
refused() {
  status=0
  "$@" > out 2> err || status=$?
  [ $status = 2 ] && grep -q "$reason" err
}

step='training'
train --tokenizer "$fixtures/gpt2_kind.json" --out a --steps 20 --checkpoint-every 10 \
  > report 2> progress
grep -q ' tokens to train on' progress
step='bits per byte are bits per token times tokens over bytes'
bytes=$(wc -c < text.txt)
held=$(sed -n 's/.*to train on, \([0-9]*\) held out/\1/p' progress)
awk -v bytes="$bytes" -v held="$held" '{
    sub(/.*loss /, ""); split($0, part, ", "); sub(/ .*/, "", part[2]);
    n = 0.05 * bytes; n = n > int(n) ? int(n) + 1 : n
    expected = part[1] / log(2) * held / n
    exit !(part[2] - expected < 2e-4 && expected - part[2] < 2e-4) }' report

step='tokenizer.json goes along'
gpt2=$fixtures/gpt2_kind.json neox=$fixtures/neox_kind.json
cmp a/tokenizer.json "$gpt2"
"$program" convert --model a --out b
generate --model a --prompt "$prompt" > from_a
for model in b a/checkpoints/step-00000020; do
  cmp $model/tokenizer.json a/tokenizer.json
  generate --model $model --prompt "$prompt" | cmp - from_a
done
generate --model a --prompt "$prompt" --tokenizer "$gpt2" | cmp - from_a

step='a stop text ends within a token'
new=$(sed "1s/^$prompt//" from_a | tr -d '\n' | cut -c 1-6)
stop=$(printf %s "$new" | cut -c 2-3)
generate --model a --prompt "$prompt" --stop "$stop" > stopped
[ "$(wc -c < stopped)" -lt "$(wc -c < from_a)" ]
tr -d '\n' < stopped | grep -q "$stop\$"

step='resuming with its own tokenizer'
train --resume --out a --steps 21 > /dev/null 2>&1
step='refusals'
reason='expected that of the run' refused train --resume --out a --tokenizer "$neox"
reason='expected at most the 1501' refused generate --model a --prompt x --tokenizer "$neox"
reason='expected UTF-8' refused generate --model a --prompt "$(printf '\377')"
rm a/config.json
reason='tokenizer.json exists' refused train --out a --steps 1
mkdir c
printf '{"version": "1.0", "model": {"type": "WordPiece"}}' > c/tokenizer.json
reason='pre_tokenizer: expected' refused train --tokenizer c/tokenizer.json --out d --steps 1
echo 'train, convert and generate follow tokenizer.json'
