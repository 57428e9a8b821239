#!/bin/sh
# cllm-chat: SmolLM2-135M-Instruct answering as before, only faster: distilled from its own greedy answers.
# usage: recipes/cllm-chat.sh PROMPTS OUTPUT
#   PROMPTS  .jsonl with a "prompt" a line, or a number: the model writes so many prompts itself
#   OUTPUT   folder for everything; a second run goes on where the first stopped
set -eu
prompts=$1 output=$2

case $prompts in
  *[!0-9]*) set -- --data "$prompts" ;;
  *) set -- --self-written "$prompts" ;;
esac
cllm trajectories "$@" --block-length 16 --max-tokens 256 --keep-unfinished --output "$output/trajectories"
cllm train --trajectories "$output/trajectories" --domain chat \
  --block-length 16 --epochs 2 --output "$output/cllm-chat"
