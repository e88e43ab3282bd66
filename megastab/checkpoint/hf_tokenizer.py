"""The tokenizer's files beside the weights: copied both ways, and written for a SentencePiece model of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megastab.checkpoint.hf_files import read_json
from megastab.config.errors import UserError
from megastab.data.tokenizer import Tokenizer

FOLDER = "tokenizer"
SENTENCEPIECE = "tokenizer.model"
GENERATION = "generation_config.json"
FILES = (
    SENTENCEPIECE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION,
)
_ENOUGH = (SENTENCEPIECE, "tokenizer.json", "vocab.json")  # any one of them is a tokenizer
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(source: Path, config: dict[str, Any], out: Path) -> list[str]:
    """Copy what there is of a tokenizer; ids of special tokens go into ``generation_config.json``. Returns what to say."""
    out.mkdir()
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / GENERATION).is_file():
        (out / GENERATION).write_text(json.dumps({key: config.get(key) for key in SPECIAL}, indent=2) + "\n")
    if any((out / name).is_file() for name in _ENOUGH):
        return []
    return [f"{source} has no tokenizer (none of {', '.join(_ENOUGH)}): the weights alone are imported"]


def export_tokenizer(tokenizer: Path | None, vocab_size: int, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Write a tokenizer's files beside exported weights.

    Args:
        tokenizer: a SentencePiece ``.model`` file (Hugging Face's own files beside it are taken in its place), or a folder of such files;
            None where the run had none.
        vocab_size: of the model.
        out: the folder of the export.

    Returns:
        Ids of the special tokens, and what to say.
    """
    nothing = dict.fromkeys(SPECIAL)
    if tokenizer is None:
        return nothing, ["the run had no megastab.data.tokenizer: no tokenizer is exported; give one with --tokenizer"]
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    there = {name for name in FILES if (folder / name).is_file()}
    if there - {SENTENCEPIECE}:
        return _copied(folder, there - {GENERATION}, out)
    path = folder / SENTENCEPIECE if tokenizer.is_dir() else tokenizer
    if not path.is_file():
        raise UserError(f"no tokenizer {path}: give the run's .model file, or a folder with tokenizer files, as --tokenizer")
    return _written(Tokenizer(path), vocab_size, out)


def _copied(folder: Path, names: set[str], out: Path) -> tuple[dict[str, Any], list[str]]:
    for name in names:
        shutil.copyfile(folder / name, out / name)
    ids: dict[str, Any] = dict.fromkeys(SPECIAL)
    if (folder / GENERATION).is_file():
        ids |= {key: value for key, value in read_json(folder / GENERATION).items() if key in SPECIAL}
    if not names.intersection(_ENOUGH):
        return ids, [f"{folder} holds no tokenizer, and none is exported; give one with --tokenizer"]
    return ids, [f"the tokenizer's files are those of {folder}"]


def _written(tokenizer: Tokenizer, vocab_size: int, out: Path) -> tuple[dict[str, Any], list[str]]:
    """``tokenizer.model`` as it is, and the settings under which LLaMA's tokenizer class reads it as we do.

    That class merges pairs (BPE). It takes a U+2581 of the text for a space, where ours keeps it: the one known difference.
    """
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, the model {vocab_size} tokens: give the run's own")
    shutil.copyfile(tokenizer.path, out / SENTENCEPIECE)
    settings = llama_settings(tokenizer)
    notes = [f"{tokenizer.path} is no BPE model: {SENTENCEPIECE} is written for SentencePiece itself, transformers has no class for it"]
    if settings is not None:
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        notes = []
    return dict.fromkeys(SPECIAL) | {"eos_token_id": tokenizer.eod}, notes


def llama_settings(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """``tokenizer_config.json`` for a SentencePiece BPE model; None for another kind."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(tokenizer.path).read_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return None
    bos = proto.trainer_spec.bos_id
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_prefix_space": proto.normalizer_spec.add_dummy_prefix,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": proto.pieces[bos].piece if bos >= 0 else None,
        "eos_token": proto.pieces[tokenizer.eod].piece,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "clean_up_tokenization_spaces": False,
    }
