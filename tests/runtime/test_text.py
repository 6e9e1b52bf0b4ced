"""Token ids against transformers' CLIPTokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mtu_compile.core.errors import BundleError
from mtu_compile.runtime.text import Tokenizer

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


@pytest.mark.parametrize("max_length", [16, 5, 2])
def test_equals_transformers(base_pipeline_dir: Path, max_length: int) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(base_pipeline_dir / "tokenizer")
    ours = Tokenizer(base_pipeline_dir / "tokenizer/tokenizer.json", max_length, theirs.pad_token_id)
    expected = theirs(PROMPTS, padding="max_length", truncation=True, max_length=max_length, return_tensors="np")
    got = ours(PROMPTS)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, expected.input_ids)


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


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", 16, 0)
