#!/bin/sh
# convert, info MODEL, score, embed and fill-mask from a shell, with .venv/bin on the PATH:
#
#     sh examples/command_line.sh
#
# Texts are arguments, lines of --file (or JSON lines of a .jsonl) or standard input; answers are one
# JSON object a line. In place of "dates", which ships with tilewise, any folder or hub id will do.
set -e
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The same model in half the bytes, and what a folder holds, told without reading its weights.
tilewise convert dates "$work/half" --dtype bfloat16
tilewise info "$work/half"

# How likely one translation is of two sources: log P in nats.
text="May 5th, 2030"
translation=$(tilewise translate "$text")
tilewise score --model "$work/half" --context "$text" "$translation"
tilewise score --model "$work/half" --context "May 6th, 2030" "$translation"

# A vector for each line of a file, kept for later.
tilewise embed --model "$work/half" --file "$here/phrases.txt" > "$work/vectors.jsonl"
wc -l < "$work/vectors.jsonl"

# What stands behind [MASK], by the BERT that fill_mask.py trains, in a minute or two.
python "$here/fill_mask.py" --out "$work/sums" >&2
echo "two plus [MASK] is five" | tilewise fill-mask --model "$work/sums" --top-k 2
