#!/bin/sh
# cllm-chat: SmolLM2-135M-Instruct answering as before, only faster: distilled from its own greedy answers.
# usage: recipes/cllm-chat.sh PROMPTS OUTPUT
#   PROMPTS  .jsonl or .jsonl.gz with a "prompt" a line, or a number: the model writes so many prompts itself;
#            recipes/chat-prompts.jsonl.gz has those it wrote for the shipped cllm-chat. Its first three rounds had the
#            first 1,714 of them and 500 of GSM8K, its fourth these and the other 2,500
#   OUTPUT   folder for everything; a second run goes on where the first stopped
set -eu
prompts=$1 output=$2

case $prompts in
  *[!0-9]*) set -- --data "$prompts" ;;
  *) set -- --self-written "$prompts" ;;
esac
# only the answers are needed: drafts are made up and unrolled while training
cllm trajectories "$@" --block-length 1 --max-tokens 256 --keep-unfinished --max-repetition 0.6 \
  --max-num-seqs 64 --output "$output/answers"
round() { # FROM TO OPTION...
  from=$1 to=$2
  shift 2
  cllm train ${from:+"$output/$from"} --trajectories "$output/answers" --domain chat --block-length 8 \
    --synthetic-ratio 1 --packs-per-step 2 --output "$output/$to" "$@"
}
# fast and rough first, then slower and with more weight on the answers, which brings the quality back: hard answers, then
# the base's own distributions
round "" round-1 --unroll 1 --depth-decay 0.8 --blocks-per-example 32 --epochs 1 --max-steps 220 --learning-rate 1e-3
round round-1 round-2 --unroll 1 --depth-decay 0.8 --blocks-per-example 24 --epochs 1 --max-steps 200 --seed 1 \
  --ar-weight 4 --learning-rate 4e-4
round round-2 round-3 --unroll 1 --depth-decay 0.8 --blocks-per-example 24 --epochs 1 --max-steps 330 --seed 2 \
  --ar-weight 6 --learning-rate 5e-4 --target base
round round-3 round-4 --unroll 2 --depth-decay 0.7 --blocks-per-example 24 --epochs 3 --max-steps 640 --seed 6 \
  --ar-weight 6 --learning-rate 6e-4 --target base
# a little less of it, which brings back the rest; then judge it (docs/log/tries.md)
python "$(dirname "$0")/scale_adapter.py" "$output/round-4" 0.85 "$output/cllm-chat"
