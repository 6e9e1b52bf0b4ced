"""Token ids against transformers' CLIPTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile.core.errors import BundleError
from mtu_compile.runtime.text import Tokenizer, cut_by
from tests.prompts import varied_prompts

EMOJI = Path(__file__).parents[2] / "examples" / "emoji" / "model" / "tokenizer"

PROMPTS = [
    "",
    "a cat",
    "A  Cat,\tsitting\non 3 mats!",
    "x",
    "this prompt is much longer than the sixteen tokens which the model can take in",
    "exactlyfourteen",
    "don't <|endoftext|> stop",
    "naïve café 猫 🐈",
    "   ",
]

#: Names a special token that it does not have.
TEMPLATE = {"single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize("max_length", [16, 5, 2])
def test_equals_transformers(base_pipeline_dir: Path, max_length: int) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(base_pipeline_dir / "tokenizer")
    ours = Tokenizer(base_pipeline_dir / "tokenizer/tokenizer.json", max_length, theirs.pad_token_id)
    expected = theirs(PROMPTS, padding="max_length", truncation=True, max_length=max_length, return_tensors="np")
    got = ours(PROMPTS)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, expected.input_ids)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_five_hundred_prompts_equal_transformers(tmp_path: Path, pad: str) -> None:
    """Languages, signs, emoji, control characters, special tokens as text; "!" is what Stable Diffusion 2 pads with."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(EMOJI, pad_token=pad)
    assert theirs.unk_token_id != theirs.pad_token_id or pad != "!"
    theirs.save_pretrained(tmp_path)
    prompts = varied_prompts()
    assert len(set(prompts)) == 500
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=32, return_tensors="np").input_ids
    got = Tokenizer(tmp_path / "tokenizer.json", 32, theirs.pad_token_id)(prompts)
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(expected)) > 300  # not all of them unknown


def test_another_pad_token(base_pipeline_dir: Path) -> None:
    """Stable Diffusion 2 pads with "!", not with the end token."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(base_pipeline_dir / "tokenizer", pad_token="q")
    ours = Tokenizer(base_pipeline_dir / "tokenizer/tokenizer.json", 16, theirs.pad_token_id)
    assert theirs.pad_token_id == 16  # a word of its own, and none of the prompts has it
    expected = theirs(PROMPTS, padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours(PROMPTS), expected)


def test_settings_saved_in_the_file_do_not_matter(base_pipeline_dir: Path, tmp_path: Path) -> None:
    path = base_pipeline_dir / "tokenizer/tokenizer.json"
    raw = json.loads(path.read_text())
    raw["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 4},
        "direction": "Left",
        "pad_to_multiple_of": 3,
        "pad_id": 7,
        "pad_type_id": 0,
        "pad_token": "h",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    np.testing.assert_array_equal(
        Tokenizer(tmp_path / "tokenizer.json", 16, 53)(PROMPTS), Tokenizer(path, 16, 53)(PROMPTS)
    )


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "is not a tokenizer"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot encode a prompt"),
        ({"post_processor": {"type": "TemplateProcessing", **TEMPLATE}}, "cannot encode a prompt"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}}, "cannot encode a prompt"),
    ],
)
def test_a_file_at_which_the_library_gives_up_is_refused(tmp_path: Path, part: dict[str, Any], said: str) -> None:
    """Its panics are no ``Exception``: they would end a server's thread, and the command line with a traceback."""
    path = tmp_path / "tokenizer.json"
    whole = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    path.write_text(json.dumps(whole | part))
    for use in (lambda one: one(["b"]), lambda one: one.cut("b")):
        with pytest.raises(BundleError, match=rf"tokenizer\.json {said}"):
            use(Tokenizer(path, 8, 0))


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", 16, 0)


LONG = "abc defg   hij klmnop, qr st."


@pytest.mark.parametrize(
    ("max_length", "dropped"),
    [
        (2, LONG),
        (4, LONG),  # of the first word only "ab" is kept: it is not seen as itself
        (5, "defg   hij klmnop, qr st."),
        (9, "hij klmnop, qr st."),
        (18, ", qr st."),
        (19, "qr st."),
        (23, "."),
        (24, None),
        (77, None),
    ],
)
def test_what_is_cut_off_is_told_in_whole_words(base_pipeline_dir: Path, max_length: int, dropped: str | None) -> None:
    from transformers import CLIPTokenizer

    path = base_pipeline_dir / "tokenizer"
    cut = Tokenizer(path / "tokenizer.json", max_length, 53).cut(LONG)
    assert (cut and cut.dropped) == dropped
    if cut is not None:
        assert (cut.tokens, cut.limit) == (22, max_length - 2)
        notice = cut.notice("negative prompt").to_json()
        assert notice["kind"] == "prompt-cut" and notice["dropped"] == dropped and str(dropped) in notice["message"]
    theirs = CLIPTokenizer.from_pretrained(path, model_max_length=max_length)
    assert cut_by(theirs, LONG) == cut


@pytest.mark.parametrize("prompt", [*PROMPTS, "İİ 猫猫 🐈🐈", "<|endoftext|> x <|endoftext|>"])
@pytest.mark.parametrize("max_length", [2, 3, 8, 16])
def test_what_is_kept_and_what_is_dropped_are_the_prompt(base_pipeline_dir: Path, prompt: str, max_length: int) -> None:
    path = base_pipeline_dir / "tokenizer/tokenizer.json"
    short, long = Tokenizer(path, max_length, 53), Tokenizer(path, 200, 53)
    cut = short.cut(prompt)
    assert long.cut(prompt) is None
    if (long([prompt])[0] != 53).sum() + 1 > max_length and "<|" not in prompt:
        assert cut is not None and prompt.rstrip().endswith(cut.dropped) and cut.dropped
        assert cut.limit <= max_length - 2


def test_a_very_long_prompt_is_shown_in_part(base_pipeline_dir: Path) -> None:
    cut = Tokenizer(base_pipeline_dir / "tokenizer/tokenizer.json", 16, 53).cut("ab " * 1000)
    assert cut is not None and len(cut.dropped) > 2000 and len(cut.notice().message) < 400
    assert cut.notice().facts["dropped"] == cut.dropped
