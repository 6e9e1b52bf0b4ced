"""The search for layers that stay float, on errors that are given and on a graph that is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration import mixed
from calibration.layer_groups import LayerGroup
from calibration.mixed import Criteria, Effort, TaskInputs, choose
from calibration.sensitivity import Sensitivity
from mtu_compile.accuracy.calls import step_metrics
from mtu_compile.bundle import encode
from mtu_compile.bundle.quantisation import CostsRecord, MixedRecord
from mtu_compile.core.schema import conform
from targets.base import LayerCosts
from targets.costs.layers import ComparedCosts


class Network:
    """Stands in for a switched graph whose layers add known errors: independent, of given powers.

    Not a mock of arithmetic: ``run`` really returns a signal with each quantised layer's noise on it, and ``errors``
    are products of that noise with random vectors.
    """

    derivable = True

    def __init__(self, powers: list[float], size: int = 4096) -> None:
        rng = np.random.default_rng(0)
        self.groups = tuple(LayerGroup(f"layer{i}", (f"layer{i}",), "Conv") for i in range(len(powers)))
        self._signal = rng.standard_normal((2, 1, 1, size // 2))
        self._noise = [np.sqrt(p) * rng.standard_normal((2, 1, 1, size // 2)) for p in powers]

    def run(self, feed: Any, int8: Any = ()) -> np.ndarray:
        return self._signal + sum((n for u, n in zip(self.groups, self._noise, strict=True) if u.name in int8), 0.0)

    def run_all(self, feeds: Any, int8: Any = ()) -> Any:
        return (self.run(feed, int8) for feed in feeds)

    def run_each(self, feed: Any, numbers: Any) -> Any:
        return (self.run(feed, (self.groups[number].name,)) for number in numbers)

    def errors(self, feeds: Any, probes: int) -> Any:
        for feed in feeds:
            r = np.random.default_rng(1).standard_normal((probes, 1, 1, 1, self._signal.shape[-1]))
            alone = [self.noise(feed, number) for number in range(len(self.groups))]
            yield np.stack([(r * noise).sum(axis=(2, 3, 4)) for noise in alone], axis=1)

    def noise(self, feed: Any, number: int) -> np.ndarray:
        """To the first order."""
        return self._noise[number]


CALLS = [{"timestep": np.array([float(t)], np.float32)} for t in (999, 500, 1)]
POWERS = [1e-5, 3e-2, 1e-6, 4e-3, 1e-5, 1e-3]


def costs(in_float: list[float], quantised: list[float], *, measured: bool = True) -> ComparedCosts:
    def side(spent: list[float]) -> LayerCosts:
        named = {f"layer{i}": ms for i, ms in enumerate(spent)}
        return LayerCosts(named, sum(spent) + 1.0, "test", measured)

    return ComparedCosts(side(in_float), side(quantised))


def run(network: Any, guidance: Any = "none", **options: Any) -> MixedRecord:
    return choose(network, CALLS, guidance=guidance, **options)


def test_the_fewest_layers_that_are_needed_stay_float() -> None:
    """26 dB allow 2.5e-3: without the two loudest 1.0e-3 is left, and with either of them too much."""
    found = run(Network(POWERS), criteria=Criteria(slowdown=0.5))
    assert found.float_layers == ("layer1", "layer3") and found.met
    assert found.all_int8.worst_sqnr_db < 26 <= found.chosen.worst_sqnr_db
    assert [one.kept for one in found.layers if one.kept] == ["accuracy", "accuracy"]
    assert found.layers[1].sqnr_db == pytest.approx(-10 * np.log10(3e-2), abs=1.5)


def test_nothing_is_kept_where_int8_is_good_enough() -> None:
    found = run(Network([1e-5, 1e-5]))
    assert found.float_layers == () and found.met and found.all_int8 == found.chosen


def test_the_cheaper_of_two_equally_harmful_layers_becomes_float() -> None:
    powers = [4e-3, 4e-3, 1e-6]
    dear_first = costs([9.0, 2.0, 2.0], [1.0, 1.5, 1.0])
    criteria = Criteria(sqnr_db=23.5, slowdown=0.5)
    assert run(Network(powers), criteria=criteria, costs=dear_first).float_layers == ("layer1",)
    dear_second = costs([2.0, 9.0, 2.0], [1.5, 1.0, 1.0])
    assert run(Network(powers), criteria=criteria, costs=dear_second).float_layers == ("layer0",)


def test_the_search_stops_at_its_budget_and_says_so() -> None:
    """Layer 1 alone would slow the network down by more than a tenth: the criteria are missed, not the budget."""
    found = run(Network(POWERS), costs=costs([1.0, 9.0, 1.0, 1.1, 1.0, 1.0], [1.0] * 6))
    assert not found.met and "layer1" not in found.float_layers
    assert found.chosen.worst_sqnr_db < 26
    spent = sum(one.float_ms - one.int8_ms for one in found.layers if one.kept and one.float_ms and one.int8_ms)
    assert spent <= 7.0 * (1 / 0.9 - 1) + 1e-9


def test_layers_that_int8_slows_down_stay_float_if_that_was_measured() -> None:
    slow = costs([1.0, 1.0, 1.0], [0.5, 3.0, 0.5])
    found = run(Network([1e-6] * 3), costs=slow)
    assert [one.kept for one in found.layers] == [None, "slower", None]
    assert (found.layers[1].float_ms, found.layers[1].int8_ms) == (1.0, 3.0)
    assert found.costs == CostsRecord("test", True)
    estimated = run(Network([1e-6] * 3), costs=costs([1.0, 1.0, 1.0], [0.5, 3.0, 0.5], measured=False))
    assert estimated.float_layers == ()


def test_a_choice_that_misses_what_it_promised_is_searched_further() -> None:
    """Errors that add up in amplitude, not in power: the sum of single errors promises too much."""

    class Aligned(Network):
        def __init__(self) -> None:
            super().__init__([9e-4] * 6)
            self._noise = [self._noise[0]] * 6

    found = run(Aligned(), criteria=Criteria(slowdown=0.9))
    assert found.met and len(found.float_layers) == 5  # k aligned errors have k² of the power: 2.5e-3 allow one


class Bent(Network):
    """Some layers do a thousand times what the first order says: sums of estimates hide it, runs of halves do not."""

    def __init__(self, powers: list[float], hidden: list[int]) -> None:
        super().__init__(powers)
        self.runs, self.hidden = 0, hidden

    def run(self, feed: Any, int8: Any = ()) -> np.ndarray:
        self.runs += 1
        return super().run(feed, int8)

    def noise(self, feed: Any, number: int) -> np.ndarray:
        return self._noise[number] * (0.03 if number in self.hidden else 1.0)


@pytest.mark.parametrize("hidden", [[2], [0, 4]])
def test_layers_that_do_more_than_the_first_order_says_are_found_and_measured(hidden: list[int]) -> None:
    network = Bent([1e-2 if i in hidden else 1e-2 if i == 7 else 1e-6 for i in range(40)], hidden)
    found = run(network, criteria=Criteria(slowdown=0.5))
    assert found.met and found.float_layers == tuple(f"layer{i}" for i in sorted([*hidden, 7]))
    assert [i for i, one in enumerate(found.layers) if one.measured] == hidden
    assert all(found.layers[i].sqnr_db == pytest.approx(20, abs=0.3) for i in hidden)
    assert network.runs < 40  # fewer than a run for each layer


def test_looking_for_them_has_its_limit() -> None:
    """12 inferences find one of 40 layers (two a halving); 8 do not, and what is left is to do more with less."""
    powers = [1e-2 if i in (2, 7) else 1e-6 for i in range(40)]
    for looks, measured in ((12, [2]), (8, []), (0, [])):
        found = run(Bent(powers, [2]), criteria=Criteria(slowdown=0.5), effort=Effort(looks=looks, calls=1))
        assert [i for i, one in enumerate(found.layers) if one.measured] == measured


def test_a_graph_without_derivatives_is_measured_layer_by_layer() -> None:
    network = Network(POWERS)
    network.derivable = False
    found = run(network, criteria=Criteria(slowdown=0.5))
    assert found.float_layers == ("layer1", "layer3") and found.met
    assert all(one.measured for one in found.layers)
    assert found.layers[1].sqnr_db == pytest.approx(-10 * np.log10(3e-2), abs=0.1)


def test_a_search_that_comes_no_nearer_ends_and_keeps_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missed is not the layers': it grows with every layer that becomes float."""

    class Stubborn(Network):
        runs = 0

        def run(self, feed: Any, int8: Any = ()) -> np.ndarray:
            self.runs += 1
            beside = 0.0 if not int8 else 6e-2 * (1 + 0.1 * (len(self.groups) - len(int8)))
            return super().run(feed, int8) + beside * self._signal

    powers = [3e-2, *(4e-5 + 1e-8 * i for i in range(60))]
    network, patient = Stubborn(powers), Stubborn(powers)
    found = run(network, criteria=Criteria(slowdown=0.9), effort=Effort(calls=1))
    assert not found.met and found.float_layers == ("layer0",)
    monkeypatch.setattr("calibration.mixed.choosing._PATIENCE", 100)
    assert run(patient, criteria=Criteria(slowdown=0.9), effort=Effort(calls=1)).float_layers == ("layer0",)
    assert network.runs < patient.runs


def test_errors_of_one_graph_serve_another(tmp_path: Path) -> None:
    """Of the groups that both have; one that is the other's own is measured, and what a choice does is run there."""
    task = {"t2i": TaskInputs(CALLS, "none")}  # type: ignore[arg-type]
    known = mixed.layer_errors(Network(POWERS[:5]), task, effort=Effort())  # type: ignore[arg-type]
    known.save(tmp_path / "errors.safetensors")
    errors = mixed.LayerErrors.load(tmp_path / "errors.safetensors")
    network = Network(POWERS)
    (found,) = mixed.choose_for_all(
        network,  # type: ignore[arg-type]
        task,
        criteria=Criteria(slowdown=0.5),
        errors=errors,
    ).values()
    alone = run(network, criteria=Criteria(slowdown=0.5))
    assert found.float_layers == alone.float_layers == ("layer1", "layer3") and found.met
    assert [layer.measured for layer in found.layers] == [False] * 5 + [True]
    assert [layer.sqnr_db for layer in found.layers[:5]] == [layer.sqnr_db for layer in alone.layers[:5]]
    assert found.chosen == alone.chosen and found.all_int8 != alone.all_int8


def test_guidance_is_a_criterion_of_its_own() -> None:
    """Noise that is small beside the output and large beside the difference of its samples."""
    network = Network([2e-4, 1e-7])
    half = network._signal[:1]
    network._signal = np.concatenate([half, half + 0.03 * np.random.default_rng(3).standard_normal(half.shape)])
    assert run(network).float_layers == ()
    found = run(network, "text", criteria=Criteria(slowdown=0.6))
    assert found.float_layers == ("layer0",)
    assert found.all_int8.guidance_ratio is not None and found.chosen.guidance_ratio is not None
    assert found.all_int8.guidance_ratio[1] > 1.03 > found.chosen.guidance_ratio[1]


def test_criteria_are_judged_at_every_call() -> None:
    good = np.ones((2, 1, 4, 4))
    steps = [step_metrics({"y": good}, {"y": good * (1 + e)}, timestep=1.0) for e in (1e-3, 1e-1)]
    assert Criteria().met_by(steps[:1]) and not Criteria().met_by(steps)


def test_the_record_is_plain_json() -> None:
    found = run(Network(POWERS), criteria=Criteria(slowdown=0.5))
    data = json.loads(json.dumps(encode(found)))
    assert data["layers"][1]["kept"] == "accuracy" and data["criteria"]["sqnr_db"] == 26.0
    assert data["calls"] == len(CALLS) and data["layers"][0]["members"] == ["layer0"]
    assert conform(MixedRecord, data) == found


def test_large_networks_are_measured_on_fewer_calls() -> None:
    many = [{"timestep": np.array([float(t)], np.float32)} for t in range(60)]
    efforts = small, large, huge = Effort.of(10), Effort.of(10**9), Effort.of(2_600_000_000)
    assert (
        small.check_calls > large.check_calls > huge.check_calls > huge.calls >= 1
        and small.rounds > large.rounds > huge.rounds >= 1
    )
    found = [choose(Network([1e-5]), many, guidance="none", effort=one) for one in efforts]  # type: ignore[arg-type]
    assert [one.calls for one in found] == [one.calls for one in efforts]
    assert [one.check_calls for one in found] == [one.check_calls for one in efforts]


@pytest.mark.parametrize(("powers", "asked"), [([1e-5, 1e-6], {1}), (POWERS, {4})])
def test_estimates_that_nothing_is_chosen_by_are_rough(powers: list[float], asked: set[int]) -> None:
    class Counting(Network):
        def errors(self, feeds: Any, probes: int) -> Any:
            seen.add(probes)
            return super().errors(feeds, probes)

    seen: set[int] = set()
    effort = Effort(probes=4, probes_if_met=1)
    found = run(Counting(powers), effort=effort, criteria=Criteria(slowdown=0.5))
    assert seen == asked and found.met
    # whether a layer stays float is not for rough estimates to say
    assert bool(found.float_layers) == (asked != {1})


def test_layers_are_measured_on_the_worst_calls_and_others() -> None:
    """Of two calls one is the one that all of INT8 does worst."""

    class Late(Network):
        def run(self, feed: Any, int8: Any = ()) -> np.ndarray:
            found = super().run(feed, int8)
            return found + (found - self._signal) * 9 if feed["timestep"] == 1 else found

        def noise(self, feed: Any, number: int) -> np.ndarray:
            return self._noise[number] * (10 if feed["timestep"] == 1 else 1)

    found = run(Late([1e-3]), effort=Effort(calls=2))
    assert found.calls == 2 and found.check_calls == 3
    assert found.layers[0].worst_sqnr_db == pytest.approx(10, abs=1.5)
    assert found.layers[0].sqnr_db == pytest.approx(13, abs=1.5)


def test_sensitivities_are_pooled_over_the_calls() -> None:
    one = Sensitivity(
        (LayerGroup("a", ("a",), "Conv"),), np.array([[1e-2, 1e-4]]), np.zeros((1, 2, 0)), np.ones((1, 2), bool)
    )
    assert one.sqnr_db(0) == pytest.approx(-10 * np.log10((1e-2 + 1e-4) / 2)) and one.worst_sqnr_db(0) == 20.0


# --- one choice for several tasks ---


class Tasks(Network):
    """A shared network: what a layer's error is depends on the call's task, and so does the number of samples."""

    def __init__(self, powers: dict[int, list[float]]) -> None:
        self._own = {task: Network(own) for task, own in powers.items()}
        self.groups = next(iter(self._own.values())).groups
        self.runs = 0

    def run(self, feed: Any, int8: Any = ()) -> np.ndarray:
        self.runs += 1
        return self._own[int(feed["task"])].run(feed, int8)

    def errors(self, feeds: Any, probes: int) -> Any:
        for feed in feeds:
            self.runs += probes
            yield from self._own[int(feed["task"])].errors([feed], probes)


def of_task(number: int, *, count: int = 3, guidance: Any = "none") -> TaskInputs:
    feeds = [{"timestep": np.array([float(t)], np.float32), "task": number} for t in range(count)]
    return TaskInputs(feeds, guidance)  # type: ignore[arg-type]


def test_a_layer_becomes_float_for_the_task_that_needs_it() -> None:
    """Each task has one layer that is too much for it alone: both become float, and each record has its own errors."""
    network = Tasks({0: [1e-6, 3e-2, 1e-6], 1: [1e-6, 1e-6, 3e-2]})
    tasks = {"t2i": of_task(0), "sr": of_task(1)}
    found = mixed.choose_for_all(network, tasks, criteria=Criteria(slowdown=0.7))  # type: ignore[arg-type]
    assert list(found) == ["t2i", "sr"] and all(one.met for one in found.values())
    assert {one.float_layers for one in found.values()} == {("layer1", "layer2")}
    assert {one.chosen_for for one in found.values()} == {("t2i", "sr")}
    for name, loud, quiet in (("t2i", 1, 2), ("sr", 2, 1)):
        layers = found[name].layers
        assert layers[loud].sqnr_db == pytest.approx(15.2, abs=1.5) and layers[quiet].sqnr_db == pytest.approx(
            60, abs=1.5
        )
        assert layers[loud].kept == layers[quiet].kept == "accuracy"
        assert found[name].all_int8.worst_sqnr_db < 26 <= found[name].chosen.worst_sqnr_db
        assert conform(MixedRecord, json.loads(json.dumps(encode(found[name])))) == found[name]


def test_the_task_that_misses_is_the_one_that_says_so() -> None:
    network = Tasks({0: [1e-5, 1e-5, 1e-5], 1: [1e-1, 1e-1, 1e-1]})
    tasks = {"t2i": of_task(0), "sr": of_task(1)}
    found = mixed.choose_for_all(network, tasks, criteria=Criteria(slowdown=0.4))  # type: ignore[arg-type]
    assert found["t2i"].met and not found["sr"].met and len(found["t2i"].float_layers) == 1


def test_each_task_is_judged_by_its_own_guidance() -> None:
    """The same small noise is too much for the difference of two samples, where there is a difference to keep."""
    network = Tasks({0: [2e-4, 1e-7], 1: [2e-4, 1e-7]})
    for one in network._own.values():
        half = one._signal[:1]
        one._signal = np.concatenate([half, half + 0.03 * np.random.default_rng(3).standard_normal(half.shape)])
    plain = {"sr": of_task(0), "again": of_task(1)}
    guided = {"sr": of_task(0), "t2i": of_task(1, guidance="text")}
    criteria = Criteria(slowdown=0.6)
    assert mixed.choose_for_all(network, plain, criteria=criteria)["sr"].float_layers == ()  # type: ignore[arg-type]
    found = mixed.choose_for_all(network, guided, criteria=criteria)  # type: ignore[arg-type]
    assert found["sr"].float_layers == found["t2i"].float_layers == ("layer0",)
    assert found["sr"].chosen.guidance_ratio is None and found["t2i"].chosen.guidance_ratio is not None
    assert found["sr"].layers[0].guidance_db is None and found["t2i"].layers[0].guidance_db is not None


@pytest.mark.parametrize("weights", [10, 10**9, 2_600_000_000])
def test_four_tasks_together_cost_at_most_what_two_cost_alone(weights: int) -> None:
    powers, effort = [1e-5] * 50, Effort.of(weights)
    alone, shared = Tasks({0: powers}), Tasks(dict.fromkeys(range(4), powers))
    choose(alone, of_task(0, count=120).inputs, guidance="none", effort=effort)  # type: ignore[arg-type]
    told: list[int] = []
    split = effort.split(4)
    found = mixed.choose_for_all(
        shared,  # type: ignore[arg-type]
        {str(task): of_task(task, count=120) for task in range(4)},
        effort=split,
        progress=told.append,
    )
    assert alone.runs < shared.runs <= 2 * alone.runs
    assert sum(told) == split.estimates([120] * 4)
    assert all(one.calls >= 1 and one.check_calls > one.calls for one in found.values())
    assert effort.split(1) == effort


def test_the_only_call_a_task_is_measured_on_is_its_worst() -> None:
    class Late(Tasks):
        def run(self, feed: Any, int8: Any = ()) -> np.ndarray:
            found = super().run(feed, int8)
            signal = self._own[0]._signal
            return found + (found - signal) * 9 if feed["timestep"] == 1 else found

        def errors(self, feeds: Any, probes: int) -> Any:
            for feed in feeds:
                yield next(super().errors([feed], probes)) * (10 if feed["timestep"] == 1 else 1)

    network = Late({0: [1e-3]})
    found = mixed.choose_for_all(network, {"t2i": of_task(0)}, effort=Effort(calls=1))  # type: ignore[arg-type]
    assert found["t2i"].layers[0].sqnr_db == pytest.approx(10, abs=1.5)
    assert found["t2i"].chosen_for == ()


def test_a_failure_names_the_layers_that_are_to_blame() -> None:
    found = run(Network(POWERS), criteria=Criteria(slowdown=0.2))  # one float layer is affordable
    assert found.float_layers == ("layer1",) and not found.met
    blamed = mixed.to_blame(found, 2)
    assert blamed.startswith("layer3 (2") and "layer5 (" in blamed and "layer1" not in blamed
