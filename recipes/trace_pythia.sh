#!/usr/bin/env bash
# How polynomial the blocks of Pythia-160m are, through its training. Needs a network: 16 checkpoints of 0.4 GB each.
# An interrupted run goes on where it stopped. Arguments are passed on, as in: recipes/trace_pythia.sh --tokens 16384
set -euo pipefail
steps=0,1,2,4,8,16,32,64,128,256,512,1000,4000,16000,64000,143000
surgery trace EleutherAI/pythia-160m --revisions "step${steps//,/,step}" -o build/pythia "$@"
