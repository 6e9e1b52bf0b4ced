"""The tokenizer OpenVINO GenAI runs gives the ids of transformers' CLIPTokenizer."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from targets.openvino.charsmap import charsmap
from targets.openvino.tokenizer_ir import TOKENIZER_IR, convert_tokenizer, lower_case_table
from tests.prompts import varied_prompts
from tests.slow_tokenizer import write_slow_tokenizer

EMOJI = Path(__file__).parents[3] / "examples" / "emoji" / "model" / "tokenizer"

pytest.importorskip("openvino_tokenizers", reason="pip install openvino-tokenizers")


def tokenizer(folder: Path, slow: str | None = None, **options: Any) -> CLIPTokenizer:
    """The example's; ``slow`` is the padding of one that comes as Stable Diffusion's do."""
    if slow is None:
        return CLIPTokenizer.from_pretrained(EMOJI, **options)
    shutil.copytree(EMOJI, folder / "slow")
    write_slow_tokenizer(folder / "slow", slow)
    return CLIPTokenizer.from_pretrained(folder / "slow")


def ids_of(compiled: Any, prompt: str) -> list[int]:
    import openvino

    # On its way from Python a text ends at a zero character; OpenVINO GenAI, below, keeps them.
    tensor = openvino.Tensor([prompt])
    return [int(one) for one in compiled(tensor)["input_ids"][0]]


@pytest.mark.parametrize(
    "options",
    [{}, {"slow": "!"}, {"extra_special_tokens": ["<Cat-Toy>", "b"]}],
    ids=["as the example", "padded with !, as Stable Diffusion 2", "with learnt words"],
)
def test_five_hundred_prompts_have_equal_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    import openvino

    theirs = tokenizer(tmp_path, **options)
    theirs.save_pretrained(tmp_path)
    assert convert_tokenizer(tmp_path)
    compiled = openvino.compile_model(str(tmp_path / TOKENIZER_IR), "CPU")
    prompts = [prompt.replace("\0", "\1") for prompt in varied_prompts()]
    wrong = {}
    for prompt, expected in zip(prompts, theirs(prompts, truncation=True).input_ids, strict=True):
        if (got := ids_of(compiled, prompt)) != expected:
            wrong[prompt] = (got, expected)
    assert not wrong, list(wrong.items())[:5]


def test_the_converters_own_graph_would_fail(tmp_path: Path) -> None:
    """What is mended is still broken in it; else the mending can go."""
    import openvino
    import openvino_tokenizers

    theirs = tokenizer(tmp_path, slow="!")
    compiled = openvino.compile_model(openvino_tokenizers.convert_tokenizer(theirs), "CPU")
    for prompt in ("a red heart!", "ΟΔΟΣ ς", "a <|endoftext|> b", "a <|EndOfText|> b"):
        assert ids_of(compiled, prompt) != theirs(prompt).input_ids


def test_openvino_genai_reads_it(tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai", reason="pip install openvino-genai")
    shutil.copytree(EMOJI, tmp_path / "tokenizer")
    convert_tokenizer(tmp_path / "tokenizer")
    tokenizer, theirs = genai.Tokenizer(str(tmp_path / "tokenizer")), CLIPTokenizer.from_pretrained(EMOJI)
    for prompt in ("a Red heart!", "ΟΔΟΣ ς İ", "<|STARToftext|> a <|endoftext|> b", "zero \x00a \x00", "long " * 100):
        assert list(tokenizer.encode(prompt).input_ids.data[0]) == theirs(prompt, truncation=True).input_ids


def test_a_charsmap_lowers_every_letter_as_the_library_does() -> None:
    from tokenizers import normalizers

    table = lower_case_table()
    assert len(table) > 1400 and table["İ"] == "i\u0307" and "ς" not in table
    ours, theirs = normalizers.Precompiled(charsmap(table)), normalizers.Lowercase()
    for start in range(0, sys.maxunicode + 1, 4096):
        text = "".join(chr(code) for code in range(start, start + 4096) if not 0xD800 <= code < 0xE000)
        assert ours.normalize_str(text) == theirs.normalize_str(text)


def test_a_charsmap_of_words() -> None:
    from tokenizers import normalizers

    table = {"ab": "x", "abc": "yy", "b": "", "日本": "nihon"}
    normalise = normalizers.Precompiled(charsmap(table)).normalize_str
    # The longest key wins; the library looks it up grapheme by grapheme.
    assert [normalise(one) for one in ("b", "a", "c", "z")] == ["", "a", "c", "z"]
