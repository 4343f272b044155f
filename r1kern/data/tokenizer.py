"""Tokenizers: a model folder's own, and the demo's (a token per character, phrase and tag)."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import Regex as TokenRegex
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r1kern.data.template import R1_ZERO_PREFIX, R1_ZERO_SUFFIX
from r1kern.errors import UserError
from r1kern.rewards.format import TAGS

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json says all
SPECIAL = ("<pad>", "<eos>", "<unk>")
# Printable ASCII but the backtick, which makes the vocabulary a multiple of 8 (104).
CHARACTERS = [c for c in string.digits + string.ascii_letters + string.punctuation if c != "`"]
CHARACTERS += [" ", "\n"]


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False):
    """The tokenizer of a model folder.

    Raises:
        UserError: the folder has none, or it names no end-of-sequence token.
    """
    if not any((Path(folder) / name).is_file() for name in FILES):
        raise UserError(f"{folder} has no tokenizer ({' or '.join(FILES)}): copy it there")
    # AutoTokenizer prefers the architecture's own class to the generic one that the folder names,
    # and splits text by that class's rules.
    kind = PreTrainedTokenizerFast if _is_generic(Path(folder)) else AutoTokenizer
    tokenizer = kind.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {folder} has no end-of-sequence token: set eos_token")
    return tokenizer


def _is_generic(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return json.loads(config.read_text()).get("tokenizer_class") in GENERIC


def build_demo_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of 104 tokens in which the R1-Zero template costs two and each tag one.

    The tags are not special tokens, so they survive `decode(..., skip_special_tokens=True)`. Every
    text of printable ASCII without backticks decodes to itself.

    Args:
        words: further tokens, one for each word (or character beyond ASCII); spare ones fill the
            vocabulary up to a multiple of 8.
    """
    spare = [f"<spare-{i}>" for i in range(-len(words) % 8)]
    phrases = [R1_ZERO_PREFIX, R1_ZERO_SUFFIX, *TAGS, *words, *spare]
    tokens = [*SPECIAL, *CHARACTERS, *phrases]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(TokenRegex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in phrases])
    assert len(tokens) == tokenizer.get_vocab_size() == 104 + len(words) + len(spare)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
