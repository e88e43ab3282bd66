"""The bad batches of docs/experiments: the right samples change, and no other."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BATCH, SEQ, VOCAB = 4, 32, 512


@pytest.mark.parametrize("seed", [1, 2])
def test_poison_changes_the_samples_of_the_chosen_steps_and_no_other(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "experiments"))
    monkeypatch.delitem(sys.modules, "poison", raising=False)
    from poison import poison

    from megastab.data.blend import open_blend

    target = tmp_path / "text_train"
    poison(text_data / "text_train", target, {3: "noise", 7: "repeat"}, batch=BATCH, seq_len=SEQ, seed=seed, vocab_size=VOCAB)
    clean, bad = (open_blend([(1.0, str(prefix))], SEQ, seed) for prefix in (text_data / "text_train", target))
    chosen = {3: range(8, 12), 7: range(24, 28)}  # a step of four samples, counted from 1
    for sample in range(clean.first_epoch_samples):
        before, after = clean[sample].tokens, bad[sample].tokens
        changed = np.flatnonzero(before != after)
        if sample in chosen[3]:
            assert len(changed) > 0.8 * (SEQ - 1) and changed[0] > 0 and changed[-1] < SEQ, f"sample {sample}"
        elif sample in chosen[7]:
            assert set(after[1:-1]) == {bad[24].tokens[1]} and after[0] == before[0] and after[-1] == before[-1], f"sample {sample}"
        else:
            assert not len(changed), f"sample {sample} changed too"


def test_poison_refuses_a_sample_that_would_come_twice(text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "experiments"))
    monkeypatch.delitem(sys.modules, "poison", raising=False)
    from poison import poison

    with pytest.raises(ValueError, match="beyond the first epoch"):
        poison(text_data / "text_train", tmp_path / "text_train", {10**6: "noise"}, batch=BATCH, seq_len=SEQ, seed=1, vocab_size=VOCAB)
