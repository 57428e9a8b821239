#!/bin/sh
# cllm-sql: a Consistency LLM for text-to-SQL, as a LoRA adapter on SmolLM2-135M-Instruct.
# usage: recipes/cllm-sql.sh SPIDER OUTPUT
#   SPIDER   folder with train_spider.json, dev.json and tables.json
#   OUTPUT   folder for everything; a second run goes on where the first stopped
set -eu
spider=$1 output=$2

cllm sft --data "$spider/train_spider.json" --tables "$spider/tables.json" --domain text-to-sql \
  --epochs 2 --learning-rate 1e-3 --packs-per-step 4 --output "$output/teacher"
# only the teacher's answers are needed: drafts are made up and unrolled while training
cllm trajectories "$output/teacher" --data "$spider/train_spider.json" --tables "$spider/tables.json" \
  --block-length 1 --max-tokens 128 --max-num-seqs 64 --output "$output/answers"
cllm train "$output/teacher" --trajectories "$output/answers" --domain text-to-sql \
  --block-length 16 --blocks-per-example 8 --synthetic-ratio 1 --unroll 1 \
  --epochs 1 --learning-rate 8e-4 --packs-per-step 4 --output "$output/round-1"
cllm train "$output/round-1" --trajectories "$output/answers" --domain text-to-sql \
  --block-length 12 --blocks-per-example 8 --synthetic-ratio 1 --unroll 1 --ar-weight 2 \
  --epochs 2 --learning-rate 8e-4 --packs-per-step 4 --output "$output/round-2"
# twice more, on its own answers, schemas renamed too (the shipped one had 5,060 of the 14,000 in round 3: docs/log/tries.md)
cllm trajectories "$output/round-2" --data "$spider/train_spider.json" --tables "$spider/tables.json" --renamings 1 \
  --block-length 1 --max-tokens 128 --max-num-seqs 64 --output "$output/own-answers"
cllm train "$output/round-2" --trajectories "$output/own-answers" --domain text-to-sql \
  --block-length 12 --blocks-per-example 8 --synthetic-ratio 1 --unroll 1 --depth-decay 0.9 --ar-weight 2 \
  --epochs 1 --max-steps 340 --learning-rate 6e-4 --packs-per-step 2 --output "$output/round-3"
cllm train "$output/round-3" --trajectories "$output/own-answers" --domain text-to-sql \
  --block-length 12 --blocks-per-example 8 --synthetic-ratio 1 --unroll 1 --depth-decay 0.9 --ar-weight 2 \
  --epochs 1 --max-steps 480 --seed 3 --learning-rate 7e-4 --packs-per-step 2 --output "$output/round-4"
# and from drafts as decoding meets them: the states of its own trajectories. It is what helped most (the shipped one had
# 8,064 trajectories, and the answers above with made-up drafts beside them)
cllm trajectories "$output/round-4" --data "$spider/train_spider.json" --tables "$spider/tables.json" --renamings 2 \
  --block-length 12 --max-tokens 128 --max-num-seqs 64 --output "$output/own-states"
cllm train "$output/round-4" --trajectories "$output/own-states" --domain text-to-sql \
  --block-length 12 --blocks-per-example 8 --synthetic-ratio 0.3 --unroll 1 --depth-decay 0.9 --ar-weight 2 \
  --epochs 1 --max-steps 800 --seed 5 --learning-rate 8e-4 --packs-per-step 2 --output "$output/cllm-sql"
# cllm.json of the shipped one says 10, which was the fastest
cllm eval "$output/cllm-sql" --target "$output/teacher" --task spider --data "$spider/dev.json" \
  --tables "$spider/tables.json" --block-lengths 8,10,12 --limit 160 --repeats 1 --cached-prefixes \
  --output "$output/results"
