"""Smoke tests of the benchmarks: they run, and the programs that they compare compute the same numbers.

`make bench` measures the times. Three tests compile a dozen meta-steps and run only with `make test-slow`.
"""

import json

import jax
import pytest

from benchmarks import adapters, first, growth, meta_step, overhead, render, rewriting, timing, uap, w1
from experiments import train_victim

pytestmark = pytest.mark.standard_promotion


@pytest.mark.slow
def test_meta_step(tmp_path, capsys):
    with jax.numpy_rank_promotion("allow"):  # the layers of flax in plain_jax need it
        meta_step.bench(meta_step.Config(output=str(tmp_path / "bench.json"), repeats=1, smoke=True))
    results = json.loads((tmp_path / "bench.json").read_text())
    for work in results["works"].values():
        assert max(work["largest_difference"].values()) < 1e-4
        assert work["ratio"]["lft_jax"] == 1
    assert "times the floor" in capsys.readouterr().out


def test_gflop_of_w1_equals_count_by_hand():
    # Two passes over 1,600 images with 2,923,392 multiply-adds each; three passes over 784 x 8 x 20 coordinate updates
    # with 4,980 each; two operations per multiply-add.
    counts = meta_step.gflop(w1.Work())
    assert counts["victim, support"] == counts["victim, query"] == pytest.approx(2 * 2 * 1600 * 2.923392e-3)
    assert counts["recurrence"] == pytest.approx(2 * 3 * 784 * 8 * 20 * 4980e-9)


def test_overhead(tmp_path):
    overhead.bench(overhead.Config(output=str(tmp_path / "bench.json"), repeats=1, smoke=True))
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["update"]["d = 784"]["adam"]["ratio_to_adam"] == 1
    assert results["whole_step"]


def test_uap(tmp_path):
    victim = str(tmp_path / "victim")
    train_victim.train(train_victim.Config(source="digits", architecture="lenet", epochs=1, output=victim))
    flags = uap.Config(
        output=str(tmp_path / "bench.json"), victim=victim, images=(3, 5), draws=(2, 1), limit=0.5, smoke=True
    )
    uap.bench(flags)
    results = json.loads((tmp_path / "bench.json").read_text())
    lft = results["sizes"]["3"]["LFT (uap-linf), 2 steps"]
    assert (lft["backward"], lft["time_over_lft"]) == (60, 1) and lft["forward"] > 60  # 30 proxies in each of two steps
    # Three evaluations of clean images; in each of two steps three for the gradient and three for the history.
    plain = results["sizes"]["3"]["UAP-SGD, 2 steps"]
    assert (plain["forward"], plain["backward"]) == (15, 6)
    assert 0 <= lft["asr"] <= 1
    assert lft["asr_interval"] is not None
    assert results["sizes"]["5"]["UAP-SGD, 2 steps"]["asr_interval"] is None
    assert "| UAP-SGD, 20 steps |" in render.uap_section(results, "bench.json")


@pytest.mark.slow
def test_rewriting(tmp_path):
    with jax.numpy_rank_promotion("allow"):  # the layers of flax need it
        rewriting.bench(rewriting.Config(output=str(tmp_path / "bench.json"), repeats=1, smoke=True))
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["w1"][rewriting.USER]["seconds_over_user"] == 1
    assert results["gradients"]["LeNet"]["largest_difference"] < 1e-5
    assert "| LeNet, in a loop | 10x28x28x1 |" in render.rewriting_section(results, "bench.json")


@pytest.mark.slow
def test_growth(tmp_path):
    growth.bench(growth.Config(output=str(tmp_path / "bench.json"), repeats=1, smoke=True))
    results = json.loads((tmp_path / "bench.json").read_text())
    for case in results["devices"].values():
        assert case["largest_difference"] < 1e-4
    assert results["memory"]["K = 2"]["all stored, one part"]["peak_mib"] > 0
    assert "| 2 devices, 2 processes |" in render.growth_section(results, "bench.json")


def test_alternate_runs_contestants_in_turn():
    order = []
    times = timing.alternate({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == list("ab") * 4  # the first is the warm-up
    assert all(len(t["all"]) == 3 and t["seconds"] == sorted(t["all"])[1] for t in times.values())


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(timing, "load_of_others", lambda: 1.5)
    with pytest.raises(RuntimeError, match=r"other processes use 1\.50 cores"):
        timing.require_quiet()


@pytest.mark.slow
def test_first(tmp_path, capsys):
    first.bench(first.Config(output=str(tmp_path / "bench.json"), smoke=True))
    results = json.loads((tmp_path / "bench.json").read_text())
    assert set(results["attacks"]) == set(first.attacks())
    for seconds in results["attacks"].values():
        assert 0 < seconds["second"] < seconds["first"]
    assert 0 < results["import_seconds"]["lft_jax"] < results["import_seconds"]["jax"]
    assert "import jax" in capsys.readouterr().out


@pytest.mark.frameworks
def test_adapters(tmp_path):
    """The attack along signs is that of the loop in PyTorch, or it raises."""
    adapters.bench(adapters.Config(output=str(tmp_path / "bench.json"), repeats=1, steps=3, smoke=True))
    results = json.loads((tmp_path / "bench.json").read_text())
    small = results["modules"]["small"]
    assert small["signs"]["agreement"] > 0.9 and small["signs"]["over_pytorch"] > 0
    assert small["update"]["share"] > 0
