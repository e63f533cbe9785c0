"""What a class of models answers when it is given tokens, and what can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One sort of answer.

    does     in words             tables   of transformers, of the classes that do it
    talks    it goes on with a text, and the text has a perplexity
    splits   it reads one sequence and answers with another
    each     what one row of an answer is about        top   what the largest number of a row names
    chances  a row is the logits of a distribution     of    what the numbers are called
    """

    name: str
    does: str
    tables: tuple[str, ...]
    talks: bool = False
    splits: bool = False
    each: str = "token"
    top: str = "token"
    chances: bool = True
    of: str = "logit"


KINDS = (
    Kind(name="causal", does="tells the next token", tables=("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",), talks=True),
    Kind(
        name="seq2seq",
        does="answers a text with another",
        tables=("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
        talks=True,
        splits=True,
    ),
    Kind(name="masked", does="fills in masked tokens", tables=("MODEL_FOR_MASKED_LM_MAPPING_NAMES",)),
    Kind(
        name="sequences",
        does="classifies texts",
        tables=("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
        each="sequence",
        top="label",
    ),
    Kind(
        name="tokens", does="classifies tokens", tables=("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",), top="label"
    ),
    Kind(
        name="hidden",
        does="has no head",
        tables=("MODEL_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
        chances=False,
        of="hidden value",
    ),
)
"""Of a class that stands in several tables the first one counts."""
