#!/bin/sh
# Convert, refine and measure one of the models below, on a machine with a GPU and a network.
#
#   recipes/refine.sh smollm2|pythia|tinyllama|qwen3 [OUT]
#
# ACCELERATE=recipes/accelerate/eight_gpus.yaml  several GPUs: keep batch × accumulation × GPUs, as BATCH=4 ACCUMULATE=1
# DRY_RUN=1                                      check every command, load no weights
# MODEL, TEXT, TOKENS, LENGTH, BATCH, ACCUMULATE override what is chosen here
set -eu

# A step sees about 32,000 tokens of 1,024-token windows. 4M tokens are a hundredth of the 400M of the published
# bilinear TinyLlama (Pearce et al., arXiv 2410.08417, appendix J: +0.049 nats).
case "${1:-}" in
  smollm2)   name=HuggingFaceTB/SmolLM2-135M-Instruct; batch=16; accumulate=2 ;;
  pythia)    name=EleutherAI/pythia-160m; batch=16; accumulate=2 ;;
  tinyllama) name=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T; batch=4; accumulate=8 ;;
  qwen3)     name=Qwen/Qwen3-0.6B-Base; batch=4; accumulate=8 ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
model="${MODEL:-$name}"
out="${2:-build/$1}"
text="${TEXT:-broad}"
dry="${DRY_RUN:+--dry-run}"

[ -f "$out/closed-form/surgery.json" ] || surgery convert "$model" -o "$out/closed-form" --calibration "$text" --tokens 131072 $dry
if [ -n "$dry" ] && [ ! -d "$out/closed-form" ]; then
  echo "the twin is not there yet: refining and measuring cannot be checked before it is" >&2
  exit 0
fi
accelerate launch --config_file "${ACCELERATE:-recipes/accelerate/one_gpu.yaml}" -m surgery refine \
  "$out/closed-form" --teacher "$model" -o "$out/refined" --text "$text" --tokens "${TOKENS:-4M}" --length "${LENGTH:-1024}" \
  --batch "${BATCH:-$batch}" --accumulate "${ACCUMULATE:-$accumulate}" --validate-tokens 32768 --validate-every 10 $dry
if [ -z "$dry" ]; then
  surgery eval "$out/refined" --against "$model" -o "$out/refined/evaluation" --tasks wikitext,lambada_openai,arc_easy,piqa
fi
