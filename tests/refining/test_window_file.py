"""Training windows that lie on disk."""

import tracemalloc

import pytest
import torch
from transformers import AutoTokenizer

from surgery.refining.packing import Packer, pack
from surgery.refining.window_file import AT_ONCE, WindowFile
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    tiny.save_with_tokenizer("llama", folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("positions", [True, False])
def test_windows_are_the_same_on_disk_and_leave_nothing_behind(tokenizer, tmp_path, positions):
    texts = [list(range(5, 5 + n)) for n in (11, 30, 7, 40, 90, 3)]
    file, packer = WindowFile(tmp_path, 16, positions), Packer(16, tokenizer)
    assert len(file.windows()) == 0
    for text in texts:
        file.extend(packer.add(text))
    found, wanted = file.windows(), pack(texts, 16, tokenizer, positions)
    assert torch.equal(found.ids, wanted.ids)
    assert (found.positions is None) is not positions
    assert not positions or torch.equal(found.positions, wanted.positions)
    chosen = file.another()
    order = torch.arange(AT_ONCE + 3) % len(found)
    chosen.choose(found, order)
    assert torch.equal(chosen.windows().ids, wanted.ids[order])
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path):
    def peak(documents):
        file, packer = WindowFile(tmp_path, 64, True), Packer(64, tokenizer)
        tracemalloc.start()
        for _ in range(documents):
            file.extend(packer.add(range(5, 85)))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(file.windows()) == documents * 80 // 64
        return size

    assert peak(4000) < 64 * 1024 < 4000 * 80 * 4
