from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megastab.analysis.attention import most_attended
from megastab.analysis.attention_sums import AttentionSums, attention_means, uniform_first_mass
from megastab.analysis.first_token import overall
from megastab.analysis.hugging_face import subject_of
from megastab.analysis.own_model import subject_of as own_subject
from megastab.analysis.subject import open_subject
from megastab.config.errors import UserError
from tests.unit.analysis import planted
from tests.unit.analysis.models import foreign_model, save_foreign
from tests.unit.analysis.test_analysis_massive import ours, theirs
from tests.unit.model_generate.tiny import tiny_model


def uniform_maps(seq: int, has_sink: bool) -> torch.Tensor:
    """Every query attends alike to what it sees."""
    logits = torch.zeros(seq, seq).masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), -torch.inf)
    return F.pad(logits, (1, 0)).softmax(-1)[:, 1:] if has_sink else logits.softmax(-1)


@pytest.mark.parametrize(
    ("seq", "softmax", "softmax1"), [(8, 0.339732, 0.228621), (64, 0.074123, 0.058739), (256, 0.023923, 0.020032)]
)  # ALGORITHMS 13.5
def test_uniform_attention_has_the_masses_of_the_book(seq: int, softmax: float, softmax1: float) -> None:
    for has_sink, mass in ((False, softmax), (True, softmax1)):
        assert uniform_first_mass(seq, has_sink) == pytest.approx(mass, abs=5e-7)  # six digits are given
        sums = AttentionSums(1, 1, seq, has_sink)
        sums.see(0, uniform_maps(seq, has_sink)[None, None])
        found = overall(sums.means())
        assert found["mass"] == pytest.approx(mass, abs=1e-6) and found["uniform"] == pytest.approx(mass, abs=5e-7)
        assert found["excess"] == pytest.approx(0.0, abs=1e-6)
        assert found["sink"] == (pytest.approx(mass, abs=1e-6) if has_sink else None), "alike to the sink, so it gets what key 0 gets"
        assert found["share"] == 0.0, "all keys alike is no maximum on the first"


def test_share_leaves_out_query_0_and_counts_the_rest() -> None:
    maps = torch.tensor([[1.0, 0, 0, 0], [0.6, 0.4, 0, 0], [0.3, 0.4, 0.3, 0], [0.7, 0.1, 0.1, 0.1]])
    sums = AttentionSums(2, 2, 4)
    for layer in range(2):
        sums.see(layer, torch.stack([maps, uniform_maps(4, False)])[None])
    sums.means()
    assert sums.first_wins_LQ.flatten().tolist() == pytest.approx([2 / 3, 0.0] * 2)
    assert sums.first_mass_LQ[0, 0] == pytest.approx((1.0 + 0.6 + 0.3 + 0.7) / 4)
    assert sums.columns_LQS[0, 0].tolist() == pytest.approx([2.6 / 4, 0.9 / 4, 0.4 / 4, 0.1 / 4])
    assert sums.entropy_LQ[0, 1] == pytest.approx(1.0) and 0 < sums.entropy_LQ[0, 0] < 1
    assert most_attended(sums.columns_LQS[0, 0], 2) == [(0, pytest.approx(0.65)), (1, pytest.approx(0.225))]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
def test_maps_of_foreign_models_are_those_they_hand_out(family: str, tmp_path: Path) -> None:
    model = foreign_model(family)
    subject = open_subject(save_foreign(tmp_path, family, model), is_eager=True)
    tokens = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        handed = subject.model(input_ids=tokens, output_attentions=True).attentions
    sums = attention_means(subject, tokens, batch=2)
    expected = torch.stack([maps.mean(0) for maps in handed]).double()
    torch.testing.assert_close(sums.corner_LQCC, expected, rtol=1e-5, atol=1e-6)  # another batch size, fp32
    torch.testing.assert_close(sums.first_mass_LQ, expected[..., 0].mean(-1), rtol=1e-5, atol=1e-6)


def test_foreign_attention_that_hides_its_maps_is_told() -> None:
    subject = subject_of(foreign_model("llama"), "closed")  # opened with the default kernel
    with pytest.raises(UserError, match="does not hand out its maps"):
        attention_means(subject, torch.randint(3, 90, (1, 6)))


def test_planted_models_look_at_bos_and_nowhere_else() -> None:
    theirs_eager = theirs()
    theirs_eager.model.set_attn_implementation("eager")  # type: ignore[operator]
    for subject in (ours(), theirs_eager):
        windows = planted.windows(subject.vocab_size, 3, 30, bos=True)
        sums = attention_means(subject, windows, 2)
        # below the layer of the entry queries are 0 and all keys alike; BOS itself sees only itself either way
        assert sums.first_mass_LQ[1:].min() > 0.999 and sums.first_wins_LQ[1:].min() == 1.0
        assert sums.first_mass_LQ[0].max() == pytest.approx(uniform_first_mass(30), abs=1e-5) and sums.first_wins_LQ[0].max() == 0.0


@pytest.mark.parametrize("sink", ["softmax1", "learned", "kv_bias"])
def test_what_a_sink_takes_is_told_and_changes_the_reference(sink: str) -> None:
    sums = attention_means(own_subject(tiny_model(sink=sink), sink), torch.randint(3, 90, (2, 12)))
    found = overall(sums)
    assert found["sink"] is not None and found["sink"] > 0.02 and found["uniform"] == pytest.approx(uniform_first_mass(12, True))


def test_one_token_and_broken_weights_are_errors() -> None:
    subject = own_subject(tiny_model(), "ours")
    with pytest.raises(UserError, match="windows of one token"):
        attention_means(subject, torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="attention weights of layer 1 are not finite"):
        AttentionSums(2, 1, 3).see(1, torch.full((1, 1, 3, 3), torch.nan))
