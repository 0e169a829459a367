"""Writes lm-eval task files for BLiMP paradigms that lie in a folder, so that they run without network.

Usage: python recipes/blimp.py FOLDER_WITH_JSONL OUT. The .jsonl files are those of github.com/alexwarstadt/blimp
(`data/`); then: surgery eval TWIN --include-path OUT --tasks 'local_blimp_*'. The tasks are lm-eval's own `blimp_*`
but for where the data comes from.
"""

import sys
from pathlib import Path

TEMPLATE = """\
task: local_blimp_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {file}
output_type: multiple_choice
validation_split: train
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def main(data: str, out: str) -> None:
    files = sorted(Path(data).glob("*.jsonl"))
    if not files:
        sys.exit(f"error: no .jsonl files in {data}")
    Path(out).mkdir(parents=True, exist_ok=True)
    for file in files:
        text = TEMPLATE.format(name=file.stem, file=file.resolve())
        (Path(out) / f"{file.stem}.yaml").write_text(text)
    print(f"{len(files)} tasks in {out}: local_blimp_{files[0].stem}, …")


if __name__ == "__main__":
    main(*sys.argv[1:])
