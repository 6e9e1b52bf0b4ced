"""Pictures made with fewer whole UNet calls: what they are held to, and when a sample of them is good enough."""

from __future__ import annotations

from mtu_compile.accuracy.cached import LIMITS, cannot_reach, judge_cached, of_pictures, surely_reached
from mtu_compile.accuracy.task_metrics import PictureMetrics


def pictures(*similar: float | None, psnr: float = 40.0) -> list[PictureMetrics]:
    return [PictureMetrics({"ssim": one, "image_psnr_db": psnr}) for one in similar]


def test_means_are_judged_and_the_least_is_told() -> None:
    made = judge_cached(pictures(0.98, 0.96), LIMITS)
    assert made.failures == () and made.least_ssim == 0.96
    assert made.to_json() == {"ssim": 0.97, "image_psnr_db": 40.0, "least_ssim": 0.96, "thresholds": {"ssim": 0.97}}
    assert judge_cached(pictures(0.97, 0.96), LIMITS).failures == ("with the step cache ssim 0.965, threshold 0.97",)
    assert judge_cached(pictures(0.5), {"ssim": None}).failures == ()
    assert judge_cached(pictures(None), LIMITS).failures == ()  # nothing could be measured


def test_a_sample_has_to_leave_room_for_other_pictures() -> None:
    assert surely_reached(pictures(0.98, 0.98), LIMITS)
    assert not surely_reached(pictures(0.999, 0.95), LIMITS)  # 0.9745 on average, give or take 0.0245
    assert not surely_reached(pictures(None), LIMITS)
    assert surely_reached(pictures(0.5), {"ssim": None})
    assert not surely_reached(pictures(0.99), {**LIMITS, "image_psnr_db": 41.0})
    assert surely_reached(pictures(0.99), {**LIMITS, "image_psnr_db": 40.0})


def test_what_cannot_be_reached_any_more_is_given_up() -> None:
    assert not cannot_reach([], 4, LIMITS)
    assert cannot_reach(pictures(0.8), 4, LIMITS)  # with three perfect ones 0.95
    assert not cannot_reach(pictures(0.95), 4, LIMITS)
    assert not cannot_reach(pictures(0.1), 4, {"vif": 0.5})


def test_no_single_call_is_judged() -> None:
    assert set(of_pictures()) == {
        "latent_psnr_db",
        "image_psnr_db",
        "ssim",
        "vif",
        "inside_psnr_db",
        "outside_psnr_db",
        "truth_drop_db",
    }
