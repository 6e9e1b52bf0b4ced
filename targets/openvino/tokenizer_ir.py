"""A tokenizer as an OpenVINO graph, which OpenVINO GenAI runs, with the ids that ``transformers`` gives.

The converter of openvino-tokenizers (2026.4) leaves four differences in CLIP's tokenizer, mended in its graph:

* letters are folded where they are to be lower-cased, so ``ς`` and ``İ`` become others;
* a special token written in a prompt is followed by the end-of-word mark, ``</w>``, as text;
* one that is a word besides (Stable Diffusion 2 pads with ``!``) gets the word's id;
* one that is looked for in normalised text is not found in capitals.

Prompts that are too long are cut as ``transformers`` cuts them: OpenVINO GenAI replaces the converter's truncation by
its own, which drops the end token, and with it the text encoder's answer at the last position.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import BuildError
from targets.openvino.charsmap import charsmap
from targets.openvino.names import name_nodes

#: File name OpenVINO GenAI looks for.
TOKENIZER_IR = "openvino_tokenizer.xml"

#: Inputs of a ``BPETokenizer``: the vocabulary's strings, and its last four: the added tokens' strings (begins, ends,
#: bytes) and their ids. Between them are the merges, of which there may be none.
_VOCABULARY, _LAST = (5, 6, 7), 4

#: What a word of the vocabulary that cannot be met becomes: a byte that no text has.
_NEVER = b"\xff"


def convert_tokenizer(folder: Path) -> bool:
    """Write the CLIP tokenizer in ``folder`` as an IR beside it; ``False`` where ``openvino-tokenizers`` is missing.

    Its input is a list of prompts, its outputs are ``input_ids`` and ``attention_mask``, i64 [prompts, tokens of the
    longest]. OpenVINO GenAI pads them to the text encoder's length itself.

    Raises:
        BuildError: the converter makes another graph than the one that is mended here.
    """
    try:
        import openvino
        import openvino_tokenizers
        from tokenizers import Regex, normalizers
        from transformers import CLIPTokenizer
    except ImportError:
        return False
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    backend = tokenizer.backend_tokenizer
    # All of CLIP's normalisation but the last step, lower case.
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])
    model = openvino_tokenizers.convert_tokenizer(tokenizer)
    _lower_case(_only(model, "RegexNormalization"))
    added = backend.get_added_tokens_decoder()
    _find_in_capitals(_only(model, "SpecialTokensSplit"), [one.content for one in added.values() if one.normalized])
    _end_special_tokens(_only(model, "BPETokenizer"), {number: one.content for number, one in added.items()})
    model.validate_nodes_and_infer_types()
    _cut_long_prompts(model, int(tokenizer.model_max_length))
    _name(model)
    openvino.save_model(model, str(folder / TOKENIZER_IR), compress_to_fp16=False)
    return True


def _name(model: Any) -> None:
    """Name the nodes and the input anew: the converter derives its names from OpenVINO's numbers."""
    for node in model.get_ops():
        node.set_friendly_name("")
    name_nodes(model)
    for node in model.get_parameters():
        node.output(0).set_names({node.get_friendly_name()})


def _only(model: Any, kind: str) -> Any:
    """The one operation of its kind."""
    found = [one for one in model.get_ops() if one.get_type_name() == kind]
    if len(found) != 1:
        raise BuildError(
            f"openvino-tokenizers made a graph with {len(found)} operations {kind}, and 1 was expected",
            hint="install the version that this release was tested with: 'openvino-tokenizers==2026.4.*'",
        )
    return found[0]


def lower_case_table() -> Mapping[str, str]:
    """Letter → its lower case, of every letter that has one, as the tokenizers library has it."""
    from tokenizers import normalizers

    letters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000 and chr(code) != "\n"]
    lower = normalizers.Lowercase().normalize_str("\n".join(letters)).split("\n")
    return {one: other for one, other in zip(letters, lower, strict=True) if one != other}


@cache
def lower_case_map() -> bytes:
    """``lower_case_table`` as OpenVINO's tokenizers take it; a second's work, done once."""
    return charsmap(lower_case_table())


def _lower_case(last: Any) -> None:
    """Insert a lower-casing after ``last``, the last step of the normalisation."""
    from openvino_tokenizers.tokenizer_pipeline import CharsmapStep

    readers = [list(output.get_target_inputs()) for output in last.outputs()]
    step = CharsmapStep(charsmap=lower_case_map(), remove_extra_whitespaces=False)
    for inputs, output in zip(readers, step.get_ov_subgraph(list(last.outputs())), strict=True):
        for one in inputs:
            one.replace_source_output(output)


def _find_in_capitals(split: Any, tokens: Sequence[str]) -> None:
    """Write ``tokens`` in small letters before the operation that looks for them."""
    from openvino_tokenizers.tokenizer_pipeline import RegexNormalizationStep

    texts = [split.input(index).get_source_output() for index in (2, 3, 4)]
    for token in tokens:
        if token.isascii() and token.upper() != token:
            letters = (f"[{one.lower()}{one.upper()}]" if one.isalpha() else re.escape(one) for one in token)
            texts = RegexNormalizationStep("".join(letters), token.lower()).get_ov_subgraph(list(texts))
    for index, output in zip((2, 3, 4), texts, strict=True):
        split.input(index).replace_source_output(output)


def _end_special_tokens(bpe: Any, tokens: Mapping[int, str]) -> None:
    """Give special ``tokens``, by id, the end-of-word mark that every word is given.

    The vocabulary is looked at first; a word of it that a special token hides becomes one that no text has.
    """
    from openvino_tokenizers.utils import create_string_constant_node

    first = bpe.get_input_size() - _LAST
    added, numbers = (first, first + 1, first + 2), bpe.input(first + 3).get_source_output().get_node().data
    ended = [tokens[int(number)] + str(bpe.get_attributes()["end_suffix"]) for number in numbers]
    begins, ends, characters = (bpe.input(index).get_source_output().get_node().data for index in _VOCABULARY)
    text = characters.tobytes()
    words = [text[begin:end] for begin, end in zip(begins, ends, strict=True)]
    hidden = {token.encode() for token in ended}
    words = [_NEVER if word in hidden else word for word in words]
    for indices, strings in ((added, ended), (_VOCABULARY, words)):
        for index, output in zip(indices, create_string_constant_node(strings), strict=True):
            bpe.input(index).replace_source_output(output)


def _cut_long_prompts(model: Any, length: int) -> None:
    """Make a tokenizer keep the first ``length`` - 1 tokens and the last, the end token, of longer prompts."""
    import numpy as np
    from openvino import opset13 as ops

    def vector(*values: int) -> Any:
        return ops.constant(np.array(values, dtype=np.int64))

    for result in model.get_results():
        tokens = result.input(0).get_source_output()
        names = set(tokens.names)
        count = ops.gather(ops.shape_of(tokens), vector(1), vector(0))
        stop = ops.subtract(ops.minimum(count, vector(length)), vector(1))
        head = ops.slice(tokens, vector(0), stop, vector(1), vector(1))
        tail = ops.slice(tokens, vector(-1), vector(np.iinfo(np.int64).max), vector(1), vector(1))
        cut = ops.concat([head, tail], axis=1)
        tokens.set_names(set())
        cut.output(0).set_names(names)
        result.input(0).replace_source_output(cut.output(0))
    model.validate_nodes_and_infer_types()
