"""The formulas are their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mtu_compile.accuracy.calls import guidance_metrics, pool_guidance, step_metrics
from mtu_compile.accuracy.formulas import cosine, picture_psnr_db, psnr_db, sqnr_db, ssim
from mtu_compile.accuracy.thresholds import Thresholds, judge
from mtu_compile.core.errors import AccuracyError
from tests.accuracy.measured import metrics_of


def test_guidance_directions_of_three_samples():
    none, image, full = (np.full((1, 4, 8, 8), value) for value in (0.0, 1.0, 3.0))
    reference = np.concatenate([none, image, full])
    candidate = np.concatenate([none, 2 * image, full])
    deltas = guidance_metrics(reference, candidate, "text+image")
    assert [(d.direction, d.ratio) for d in deltas] == [("image", pytest.approx(2)), ("text", pytest.approx(0.5))]
    assert guidance_metrics(reference, candidate, "none") == ()
    with pytest.raises(AccuracyError, match="2 samples a picture"):
        guidance_metrics(reference, candidate, "text")


def test_signal_to_noise_and_cosine_are_their_definitions():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal(10_000)
    noise = rng.standard_normal(10_000)
    noise *= 0.1 * np.linalg.norm(signal) / np.linalg.norm(noise)
    assert sqnr_db(signal, signal + noise) == pytest.approx(20)
    assert sqnr_db(signal, signal) == 200
    assert sqnr_db(np.zeros(3), np.ones(3)) == -200
    assert cosine(signal, -2 * signal) == pytest.approx(-1)
    assert cosine(np.zeros(3), np.zeros(3)) == 1
    assert cosine(np.zeros(3), np.ones(3)) == 0
    assert psnr_db(np.array([0.0, 4.0]), np.array([0.4, 4.4])) == pytest.approx(20)
    assert psnr_db(np.zeros(4), np.full(4, 0.1), peak=1.0) == pytest.approx(20)
    for bad in (np.ones(4), np.array([1.0, np.nan, 1.0])):
        with pytest.raises(AccuracyError):
            sqnr_db(np.ones(3), bad)


def test_pictures():
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    assert (picture_psnr_db(picture, picture), ssim(picture, picture)) == (200.0, pytest.approx(1))
    assert picture_psnr_db(picture, picture.astype(np.float32) / 255) > 100
    noisy = np.clip(picture / 255 + 0.2 * rng.standard_normal(picture.shape), 0, 1)
    psnr, similarity = picture_psnr_db(picture, noisy), ssim(picture, noisy)
    assert 10 < psnr < 20 and similarity is not None and similarity < 0.8
    failures = judge(metrics_of((), image_psnr_db=psnr, ssim=similarity), Thresholds.default("int8"))
    assert {"image_psnr_db", "ssim"} <= {failure.metric for failure in failures}
    for bad in (picture[:8], picture[..., 0], picture.astype(np.float32), np.full((16, 16, 3), np.nan)):
        for formula in (picture_psnr_db, ssim):
            with pytest.raises(AccuracyError):
                formula(bad, bad)


def test_pooled_guidance_weighs_each_call_by_its_size():
    """A delta of norm 4 that is kept, and one of norm 3 that is lost: √(16 / 25) is left, with 9 / 25 as noise."""

    def step(norm: float, kept: float, timestep: float) -> Any:
        shared, delta = np.zeros((1, 1, 1, 1)), np.full((1, 1, 1, 1), norm)
        want, have = (np.concatenate([shared, part]) for part in (delta, kept * delta))
        return step_metrics({"out_sample": want}, {"out_sample": have}, timestep=timestep, guidance="text")

    steps = (step(4, 1, 900), step(3, 0, 500))
    text = pool_guidance(steps)["text"]
    assert text.ratio == pytest.approx(0.8) and text.sqnr_db == pytest.approx(10 * math.log10(25 / 9))
    assert (text.worst_ratio, text.cosine) == (0, 0)
    asked = Thresholds({"pooled_guidance_ratio": 0.85, "guidance_sqnr_db": 5.0})
    failures = judge(metrics_of(steps), asked)
    assert [str(failure) for failure in failures] == [
        "text_pooled_guidance_ratio 0.8, threshold 0.85",
        "text_guidance_sqnr_db 4.437, threshold 5",
    ]
    assert judge(metrics_of(steps[:1]), asked) == []
    (grown,) = judge(metrics_of((step(1, 1.5, 900),)), Thresholds({"pooled_guidance_ratio": 0.85}))
    assert grown.above and grown.threshold == pytest.approx(1 / 0.85) and grown.value == pytest.approx(1.5)
    # Twice as much and half as much are equally far from 1.
    assert pool_guidance((step(1, 2.1, 1), step(1, 0.5, 2)))["text"].worst_ratio == pytest.approx(2.1)
    assert pool_guidance((step(1, 1.9, 1), step(1, 0.5, 2)))["text"].worst_ratio == pytest.approx(0.5)
    assert pool_guidance(()) == {}
