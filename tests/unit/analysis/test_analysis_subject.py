from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megastab.analysis.hugging_face import subject_of
from megastab.analysis.own_model import subject_of as own_subject
from megastab.analysis.subject import Names, Subject, open_subject, residual_of
from megastab.config.errors import UserError
from tests.unit.analysis.models import FAMILIES, VOCAB, foreign_model, save_foreign, save_own
from tests.unit.model_generate.tiny import tiny_model

TOKENS = torch.arange(14).view(2, 7) + 3


def shapes_seen(subject: Subject) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def see(_layer: int, hidden_BSD: Tensor) -> None:
        shapes.append(tuple(hidden_BSD.shape))

    with subject.watch(subject.blocks, see), subject.watch(subject.attentions, see), subject.watch(subject.mlps, see):
        subject.run(TOKENS)
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_its_parts(family: str) -> None:
    subject = subject_of(foreign_model(family), family)
    assert shapes_seen(subject) == [(2, 7, 32)] * 9
    assert (len(subject.blocks), subject.heads, subject.hidden_size, subject.max_seq_len, subject.vocab_size) == (3, 4, 32, 48, VOCAB)
    assert subject.logits(TOKENS).shape == (2, 7, VOCAB)
    roles = [linear.role for linear in subject.linears() if linear.layer == 1]
    assert roles == (["q+k+v", "o", "up", "down"] if family == "gpt2" else ["q", "k", "v", "o", "gate", "up", "down"])


@pytest.mark.parametrize("arch", ["llama", "gpt"])
def test_our_models_show_their_parts(arch: str) -> None:
    subject = own_subject(tiny_model(arch), arch)
    assert shapes_seen(subject) == [(2, 7, 32)] * 6
    assert subject.logits(TOKENS).shape == (2, 7, 400)
    roles = [linear.role for linear in subject.linears() if linear.layer == 1]
    assert roles == ["q+k+v", "o", "gate+up" if arch == "llama" else "up", "down"]


@pytest.mark.parametrize("make", [lambda: subject_of(foreign_model("gpt2"), "gpt2"), lambda: own_subject(tiny_model(), "ours")])
def test_linears_say_which_way_they_multiply(make: Any) -> None:
    for linear in make().linears():
        x = torch.randn(5, linear.weight.shape[0 if linear.is_transposed else 1])
        product = x @ (linear.weight if linear.is_transposed else linear.weight.T)
        bias = getattr(linear.module, "bias", None)
        torch.testing.assert_close(linear.module(x), product if bias is None else product + bias, rtol=1e-5, atol=1e-5)
        assert sum(linear.parts) == product.shape[1]


def test_a_fused_matrix_parts_where_its_members_do() -> None:
    subject = own_subject(tiny_model(), "ours")
    assert [linear.parts for linear in subject.linears() if linear.layer == 0] == [(32, 16, 16), (32,), (64, 64), (32,)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "ours"])
def test_a_replacement_takes_the_outputs_place_for_all_samples(family: str) -> None:
    subject = own_subject(tiny_model(), "ours") if family == "ours" else subject_of(foreign_model(family), family)
    plain, given = subject.logits(TOKENS), []

    def double(_layer: int, hidden_BSD: Tensor) -> Tensor:
        return hidden_BSD * torch.tensor([1.0, 3.0])[:, None, None]

    def keep(_layer: int, hidden_BSD: Tensor) -> None:
        given.append(hidden_BSD.clone())

    with subject.watch(subject.attentions[1:2], double), subject.watch(subject.attentions[1:2], keep):
        changed = subject.logits(TOKENS)
    assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1])
    assert torch.equal(subject.logits(TOKENS), plain), "hooks are gone"


def test_a_tensor_is_not_opened_and_a_tuple_is() -> None:
    hidden = torch.zeros(2, 7, 32)
    assert residual_of(hidden) is hidden and residual_of((hidden, None)) is hidden
    with pytest.raises(UserError, match="a block returned dict"):
        residual_of({})


def test_hooks_are_gone_after_an_error() -> None:
    subject = own_subject(tiny_model(), "ours")
    with pytest.raises(RuntimeError), subject.watch(subject.blocks, lambda i, h: None):
        raise RuntimeError
    assert all(not block._forward_hooks for block in subject.blocks)


class Odd(nn.Module):
    """Blocks under a name of their own, beside another list of the same length."""

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=2, hidden_size=4, vocab_size=8)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        block = lambda: nn.ModuleDict({"mixer": nn.Linear(4, 4), "pre_mlp_norm": nn.LayerNorm(4)})  # noqa: E731
        self.stack = nn.ModuleList([block(), block()])
        self.adapters = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_unknown_names_are_told_and_can_be_mapped() -> None:
    with pytest.raises(UserError, match=r"several lists of 2 equal modules \(stack, adapters\).*stack \(2 x ModuleDict\).*--blocks"):
        subject_of(Odd(), "odd")
    with pytest.raises(UserError, match=r"--blocks layers: no list of modules of that name; there are stack"):
        subject_of(Odd(), "odd", Names("layers"))
    subject = subject_of(Odd(), "odd", Names("stack"))
    with pytest.raises(UserError, match=r"cannot tell which is the attention of ModuleDict, which holds mixer \(Linear\), pre_mlp_norm"):
        subject.attentions  # noqa: B018
    with pytest.raises(UserError, match=r"cannot tell which is the mlp"):  # a norm before the MLP is none
        subject.mlps  # noqa: B018
    mapped = subject_of(Odd(), "odd", Names("stack", attention="mixer"))
    assert [type(module).__name__ for module in mapped.attentions] == ["Linear", "Linear"]
    with pytest.raises(UserError, match="--mlp ffn is not in ModuleDict"):
        subject_of(Odd(), "odd", Names("stack", mlp="ffn")).mlps  # noqa: B018


def test_folders_open_as_what_they_are(tmp_path: Path) -> None:
    run = save_own(tmp_path / "mine")
    whole, part = open_subject(run), open_subject(run / "checkpoints" / "step00000003", torch.bfloat16)
    assert whole.name == part.name == "mine/step00000003" and (whole.dtype, part.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(whole.logits(TOKENS).flatten(0, 1), tiny_model().logits(TOKENS)[:, :400], rtol=0, atol=0)
    foreign = open_subject(save_foreign(tmp_path / "theirs", "qwen3"))
    assert foreign.name == "theirs" and foreign.bos == 1 and foreign.encode("ab c") == [68, 69, 3, 70]
    assert foreign.token_text(1) == "BOS '<s>'" and foreign.token_text(68) == "'a'"


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder .*nowhere.*nothing is downloaded"):
        open_subject(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no config.json and no megastab.json, but nothing"):
        open_subject(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        open_subject(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="neither a run's"):
        open_subject(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    with pytest.raises(UserError, match="cannot be loaded as a causal language model: .*nobody_knows"):
        open_subject(tmp_path)
    theirs = save_foreign(tmp_path / "theirs")
    with pytest.raises(UserError, match="--checkpoint step1 is for run folders"):
        open_subject(theirs, checkpoint="step1")
    (theirs / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be loaded"):
        open_subject(theirs)


def test_weights_that_are_missing_are_not_drawn(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_foreign(tmp_path / "theirs")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks model.layers.1.mlp.up_proj.weight"):
        open_subject(folder)


def test_a_model_without_its_tokenizer_still_opens(tmp_path: Path) -> None:
    foreign_model().save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    for subject in (open_subject(tmp_path / "bare"), open_subject(save_own(tmp_path / "mine"))):
        assert subject.bos is None and subject.token_text(7) == "<7>" and subject.decode([7, 8]) == "<7> <8>"
        with pytest.raises(UserError, match="give token ids, the prefix of a .bin/.idx dataset"):
            subject.encode("a")
