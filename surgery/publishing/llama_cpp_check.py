"""Run by path in a process of its own: what llama.cpp computes with a GGUF file.

Argument: FILE. Standard input: {"ids": token ids, "prompt": N, "top": K, "texts": [...]}. Standard output, its last
line, JSON:

    greedy   token ids that follow the first N of `ids`, as many as `ids` has after them
    top      by position from N on: [[token id, log-probability], ...] of what follows the ids before it
    tokens   token ids of each text
    engine   its version
"""

import json
import sys
import urllib.request
from importlib.metadata import version
from typing import Any

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the engine listens on this machine


def main() -> None:
    import xllamacpp

    asked = json.loads(sys.stdin.read())
    ids, begin = asked["ids"], asked["prompt"]
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = len(ids) + 8
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def post(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with OPENER.open(request, timeout=600) as response:
            return json.load(response)

    how = {"temperature": 0.0, "ignore_eos": True, "return_tokens": True}
    greedy = post("/completion", prompt=ids[:begin], n_predict=len(ids) - begin, **how)["tokens"]
    top = {}
    for at in range(begin, len(ids)):
        found = post("/completion", prompt=ids[:at], n_predict=1, n_probs=asked["top"], **how)
        for step in found.get("completion_probabilities", []):  # none where the token is a part of a character
            top[at] = [[one["id"], one["logprob"]] for one in step["top_logprobs"]]
    tokens = [post("/tokenize", content=text, add_special=False)["tokens"] for text in asked["texts"]]
    print(json.dumps({"greedy": greedy, "top": top, "tokens": tokens, "engine": f"xllamacpp {version('xllamacpp')}"}))


if __name__ == "__main__":
    main()
