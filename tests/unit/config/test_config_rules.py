"""Every rule: a config that breaks it alone, what the message says, and that the fix it tells loads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megastab.config.rules import RULES
from megastab.config.vocab import padded_vocab


@dataclass(frozen=True)
class Case:
    breaks: tuple[str, ...]
    said: tuple[str, ...]
    fix: tuple[str, ...]
    world: int = 1


CASES: dict[str, Case] = {
    "_hidden_over_heads": Case(
        ("megastab.model.hidden_size=70",),
        ("megastab.model.hidden_size = 70", "num_heads = 8", "use hidden_size = 72"),
        ("megastab.model.hidden_size=72", "megastab.model.num_heads=4"),
    ),
    "_even_head": Case(
        ("megastab.model.hidden_size=56",),
        ("hidden_size / num_heads = 56 / 8 = 7 is odd", "use hidden_size = 64"),
        ("megastab.model.hidden_size=64",),
    ),
    "_normed_heads": Case(
        ("megastab.model.arch=gpt", "megastab.model.activation=gelu", "megastab.model.hidden_size=8", "megastab.model.qk_norm=head"),
        ("megastab.model.qk_norm = head", "8 / 8 = 1", "qk_norm = full"),
        ("megastab.model.qk_norm=full",),
    ),
    "_query_groups": Case(
        ("megastab.model.num_kv_heads=3",),
        ("megastab.model.num_kv_heads = 3", "num_heads = 8", "one of 1, 2, 4, 8"),
        ("megastab.model.num_kv_heads=2",),
    ),
    "_heads_over_tensor": Case(
        ("megastab.parallel.tensor=3", "megastab.model.num_kv_heads=1", "megastab.model.vocab_size=380"),
        ("megastab.model.num_heads = 8", "megastab.parallel.tensor = 3", "one of 1, 2, 4, 8"),
        ("megastab.parallel.tensor=1", "train_batch_size=18"),
        world=3,
    ),
    "_kv_heads_over_tensor": Case(
        ("megastab.parallel.tensor=4", "megastab.model.num_heads=12", "megastab.model.num_kv_heads=6", "megastab.model.hidden_size=96"),
        ("megastab.model.num_kv_heads = 6", "megastab.parallel.tensor = 4", "one of 1, 2, 3, 6, or a multiple of 6"),
        ("megastab.parallel.tensor=2",),
        world=4,
    ),
    "_heads_over_context": Case(
        ("megastab.model.num_heads=6", "megastab.model.hidden_size=48", "megastab.model.num_kv_heads=2", "megastab.parallel.context=4"),
        ("megastab.parallel.context = 4", "megastab.model.num_heads = 6", "use context = 1 or 2."),
        ("megastab.parallel.context=2",),
        world=4,
    ),
    "_positions_over_context": Case(
        ("megastab.model.max_seq_len=33", "megastab.parallel.context=2"),
        ("megastab.model.max_seq_len = 33", "megastab.parallel.context = 2", "use max_seq_len = 34"),
        ("megastab.model.max_seq_len=34",),
        world=2,
    ),
    "_ffn_over_tensor": Case(
        ("megastab.parallel.tensor=4", "megastab.model.ffn_hidden_size=190"),
        ("megastab.model.ffn_hidden_size = 190", "megastab.parallel.tensor = 4", "use ffn_hidden_size = 192"),
        ("megastab.model.ffn_hidden_size=192",),
        world=4,
    ),
    "vocabulary_over_tensor": Case(
        ("megastab.parallel.tensor=3", "megastab.model.num_heads=6", "megastab.model.num_kv_heads=3", "megastab.model.hidden_size=60"),
        ("megastab.model.vocab_size = 1000", "padded to 1024", "megastab.parallel.tensor = 3", "power of two"),
        ("megastab.parallel.tensor=1", "train_batch_size=18"),
        world=3,
    ),
    "_layers_over_stages": Case(
        ("megastab.parallel.pipeline=8",),
        ("megastab.model.num_layers = 4", "megastab.parallel.pipeline = 8", "to 4 or less"),
        ("megastab.parallel.pipeline=4",),
        world=8,
    ),
    "_pipeline_with_zero": Case(
        ("megastab.parallel.pipeline=2", "zero_optimization.stage=2"),
        ("megastab.parallel.pipeline = 2", "zero_optimization.stage = 2", "zero_optimization.stage = 1, or pipeline = 1"),
        ("zero_optimization.stage=1",),
        world=2,
    ),
    "_sequence_slices": Case(
        ("megastab.parallel.sequence=true", "megastab.parallel.tensor=4", "megastab.model.max_seq_len=33"),
        ("2 x 33 tokens", "megastab.parallel.tensor = 4", "66 is not a multiple of 4", "use max_seq_len = 36"),
        ("megastab.model.max_seq_len=36",),
        world=4,
    ),
    "_dropout_arch": Case(
        ("megastab.model.dropout=0.1",),
        ("megastab.model.dropout = 0.1", 'megastab.model.arch = "gpt"'),
        ("megastab.model.arch=gpt",),
    ),
    "_rope_scaling_arch": Case(
        ("megastab.model.arch=gpt", "megastab.model.activation=gelu", 'megastab.model.rope_scaling={"factor":8,"original_max_seq_len":64}'),
        ("megastab.model.rope_scaling is given", '"gpt"', 'use megastab.model.arch = "llama"'),
        ("megastab.model.rope_scaling=null",),
    ),
    "_dyt_section": Case(
        ("megastab.model.dyt.alpha_other=0.5",),
        ('megastab.model.dyt is given with megastab.model.norm = "rmsnorm"', 'set megastab.model.norm to "dyt", or leave'),
        ("megastab.model.norm=dyt",),
    ),
    "_layer_norm_scaling": Case(
        ("megastab.model.layer_norm_scaling=true", "megastab.model.norm=dyt"),
        ("megastab.model.layer_norm_scaling is true", "dynamic tanh does not normalise", "set it to false, or use another"),
        ("megastab.model.norm=layernorm",),
    ),
    "_multiplier_undone": Case(
        ("megastab.model.embedding_norm=true", "megastab.model.embedding_multiplier=8"),
        ("megastab.model.embedding_multiplier = 8 with megastab.model.embedding_norm", "divides the factor out", "embedding_norm to false"),
        ("megastab.model.embedding_norm=false",),
    ),
    "_qk_clip_with_cap": Case(
        ("megastab.stability.qk_clip={}", "megastab.model.attention_softcap=50.0"),
        ("megastab.stability.qk_clip with", "attention_softcap = 50", "bounds the logits already"),
        ("megastab.model.attention_softcap=null",),
    ),
    "_qk_clip_with_norm": Case(
        ("megastab.stability.qk_clip={}", "megastab.model.qk_norm=head"),
        ("megastab.stability.qk_clip with", 'megastab.model.qk_norm = "head"', "the norm undoes that", 'megastab.model.qk_norm to "none"'),
        ("megastab.stability.qk_clip=null",),
    ),
    "_offload_compiled": Case(
        ("megastab.run.compile=true", 'megastab.parallel.activation_offload={"kind": "cpu"}'),
        ('activation_offload.kind = "cpu"', "megastab.run.compile", 'Set megastab.run.compile to false, or kind to "none"'),
        ("megastab.run.compile=false",),
    ),
    "_one_length": Case(
        ("megastab.run.total_steps=null",),
        ("megastab.run.total_steps is missing", "megastab.run.total_tokens"),
        ("megastab.run.total_tokens=51200",),
    ),
    "_one_warmup": Case(
        ("megastab.schedule.warmup_steps=10", "megastab.schedule.warmup_tokens=512"),
        ("megastab.schedule.warmup_steps = 10", "megastab.schedule.warmup_tokens = 512", "keep one"),
        ("megastab.schedule.warmup_tokens=null",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_tells_keys_values_and_a_fix_that_loads(load, refuse, name: str) -> None:
    case = CASES[name]
    message = refuse(*case.breaks, world=case.world)
    assert len(message.splitlines()) == 2, f"more than one rule is broken:\n{message}"
    for words in case.said:
        assert words in message
    load(*case.breaks, *case.fix, world=case.world)


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize(("position", "refused"), [("pre", False), ("peri", False), ("post", True), ("reordered", True)])
def test_layer_norm_scaling_needs_input_norms(load, refuse, position: str, refused: bool) -> None:
    given = ("megastab.model.layer_norm_scaling=true", f"megastab.model.norm_position={position}")
    if not refused:
        load(*given)
        return
    assert f'megastab.model.norm_position = "{position}" a block has no input norm to scale: set it to false, or use' in refuse(*given)


def test_a_multiplier_before_a_norm_that_keeps_it_is_fine(load) -> None:
    given = ("megastab.model.embedding_norm=true", "megastab.model.embedding_multiplier=8")
    load(*given, "megastab.model.norm=dyt")
    load(*given, "megastab.model.arch=gpt")


def test_both_lengths_are_refused(refuse) -> None:
    message = refuse("megastab.run.total_tokens=512")
    assert "megastab.run.total_steps = 100 and megastab.run.total_tokens = 512 are both given: keep one" in message


@pytest.mark.parametrize(("world", "heads"), [(4, 4), (8, 4), (2, 4)], ids=["equal", "copied", "shared"])
def test_key_heads_may_be_shared_or_copied(load, world: int, heads: int) -> None:
    load(f"megastab.parallel.tensor={world}", f"megastab.model.num_kv_heads={heads}", world=world)


def test_sequence_parallelism_without_tensor_parallelism_is_a_no_op(load) -> None:
    config = load("megastab.parallel.sequence=true", "megastab.model.max_seq_len=33", "megastab.parallel.pipeline=2", world=2)
    assert config.layout.tensor == 1
    assert "pipeline" not in config.deepspeed


def test_sequence_slices_count_the_tokens_of_the_whole_micro_batch(load) -> None:
    load("megastab.parallel.sequence=true", "megastab.parallel.tensor=2", "megastab.model.max_seq_len=33", world=2)


@pytest.mark.parametrize(
    ("world", "given", "said", "fix"),
    [
        (
            3,
            ("context=3",),
            "use context = 1, or on another number of ranks 2 or 4 or 8.",
            ("megastab.parallel.context=1", "train_batch_size=18"),
        ),
        (16, ("context=16", "tensor=1"), "use context = 1 or 2 or 4 or 8.", ("megastab.parallel.context=8",)),
        (4, ("context=4", "num_kv_heads=3"), "num_kv_heads = 3 does not divide", ("megastab.model.num_kv_heads=2",)),
        (4, ("context=2", "tensor=2", "sequence=true", "max_seq_len=33"), "use max_seq_len = 36", ("megastab.model.max_seq_len=36",)),
        (2, ("context=0",), "megastab.parallel.context = 0 is wrong: input should be greater than 0", ("megastab.parallel.context=2",)),
        (2, ("context=-1",), "megastab.parallel.context = -1 is wrong: input should be greater than 0", ("megastab.parallel.context=2",)),
    ],
)
def test_context_that_does_not_fit_is_told_once_with_what_would(
    load, refuse, world: int, given: tuple[str, ...], said: str, fix: tuple[str, ...]
) -> None:
    where = {"num_kv_heads": "model", "max_seq_len": "model"}
    overrides = [f"megastab.{where.get(text.split('=')[0], 'parallel')}.{text}" for text in given]
    message = refuse(*overrides, world=world)
    assert said in message and len(message.splitlines()) == 2, message
    load(*overrides, *fix, world=world)


def test_ranks_that_context_does_not_divide_are_told_how_many_do(load, refuse) -> None:
    message = refuse("megastab.parallel.context=2", world=3)
    assert "megastab.parallel.context = 2 is 2, which does not divide the 3 ranks" in message and "(deepspeed --num_gpus 4 ...)" in message
    assert load("megastab.parallel.context=2", world=4).layout.data == 2


def test_odd_heads_are_fine_without_rotary_positions(load) -> None:
    load("megastab.model.arch=gpt", "megastab.model.hidden_size=56")


@pytest.mark.parametrize(("vocab", "rows"), [(1, 128), (128, 128), (129, 256), (50257, 50304), (32000, 32000)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab: int, rows: int) -> None:
    assert padded_vocab(vocab) == rows
