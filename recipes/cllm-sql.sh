#!/bin/sh
# cllm-sql: a Consistency LLM for text-to-SQL, as a LoRA adapter on SmolLM2-135M-Instruct.
# usage: recipes/cllm-sql.sh SPIDER OUTPUT
#   SPIDER   folder with train_spider.json, dev.json and tables.json
#   OUTPUT   folder for everything; a second run goes on where the first stopped
set -eu
spider=$1 output=$2

cllm sft --data "$spider/train_spider.json" --tables "$spider/tables.json" --domain text-to-sql \
  --epochs 3 --output "$output/teacher"
cllm trajectories "$output/teacher" --data "$spider/train_spider.json" --tables "$spider/tables.json" \
  --block-length 16 --max-tokens 192 --output "$output/trajectories"
cllm train "$output/teacher" --trajectories "$output/trajectories" --domain text-to-sql \
  --block-length 16 --epochs 4 --output "$output/cllm-sql"
