#!/usr/bin/env bash
# An independent load generator, guidellm, against a running `quatom serve`:
#
#     pip install guidellm          # 0.8 or newer, in an environment of its own: it is large
#     quatom serve MODEL --served-model-name NAME --port 8000
#     scripts/load_test.sh http://127.0.0.1:8000 NAME MODEL [STREAMS] [SECONDS] [REPORT.json]
#
# MODEL is a folder with the tokenizer. Prompts have 64 tokens and answers 32.
set -euo pipefail

url=${1:?URL of the server}
name=${2:?served model name}
tokenizer=${3:?folder with the tokenizer}
streams=${4:-8}
seconds=${5:-30}
report=${6:-load_test.json}

exec guidellm run \
  --backend "kind=openai_http,target=$url,model=$name" \
  --profile "kind=concurrent,streams=$streams" \
  --constraint "kind=max_duration,seconds=$seconds" \
  --tokenizer "kind=hf_auto,model=$tokenizer" \
  --data "kind=synthetic_text,prompt_tokens=64,output_tokens=32" \
  --output "kind=json,path=$report"
