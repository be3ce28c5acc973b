"""Ablations with the smallest settings, on victims that train within seconds."""

import dataclasses
import json
import pathlib
import shlex

import jax
import numpy as np
import pytest
from absl import flags as absl_flags

from experiments import meta_train
from experiments.studies import ablation, study, victims
from experiments.studies.ablation import Variant
from lft_jax.cli import config

TINY = {
    "digits": (
        victims.Recipe("train", "small_cnn", 0, 1),
        victims.Recipe("train", "lenet", 1, 1),
        victims.Recipe("validation", "small_cnn", 100, 1),
    )
}
META = {"rule": "coordinate_lstm", "hidden": 2, "meta_steps": 1, "validation_tasks": 0, "num_directions": 6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the tiny victims."""
    folder = str(tmp_path_factory.mktemp("victims"))
    with pytest.MonkeyPatch.context() as patched, jax.numpy_dtype_promotion("standard"):
        patched.setattr(victims, "RECIPES", TINY)
        victims.train_missing(victims.Config(sources=("digits",), folder=folder))
    return folder


@pytest.mark.standard_promotion
def test_variants_are_paired_by_task_at_equal_queries(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(victims, "RECIPES", TINY)
    monkeypatch.setattr(study, "STUDIES", {"query": study.Study((), META, {"epsilon": ("digits=0.1",)})})
    variants = {
        "base": Variant(),
        "raw": Variant({"features": ("raw",), "meta_steps": 2}),
        "3 directions": Variant(judged={"num_directions": 3, "num_steps": 4}),
    }
    monkeypatch.setitem(ablation.VARIANTS, "query", variants)
    flags = ablation.Config(
        study="query",
        sources=("digits",),
        architectures=("small_cnn",),
        seeds=2,
        num_tasks=4,
        at=(1, 2),
        victims=trained,
        workdir=str(tmp_path / "runs"),
        output=str(tmp_path / "ablation.json"),
    )
    ablation.ablate(flags)
    found = json.loads((tmp_path / "ablation.json").read_text())
    rows = {row["variant"]: row for row in found["rows"]}
    assert found["flags"]["meta_steps"] == 1  # the first variant's
    assert found["flags"]["epsilon"] == ["digits=0.1"]
    assert list(rows) == list(variants)
    assert {row["victim"] for row in rows.values()} == {"digits_small_cnn_100"}
    assert {row["queries"] for row in rows.values()} == {2 * 2 * 6 * 10}
    assert rows["base"]["difference"] == [0, 0]
    assert rows["3 directions"]["at"] == [1, 2, 4]
    for name in ("raw", "3 directions"):
        np.testing.assert_allclose(rows[name]["difference"][0], rows[name]["asr"][-1] - rows["base"]["asr"][-1])
        np.testing.assert_allclose(rows[name]["difference"][0], np.mean(rows[name]["seed_differences"]))
        assert len(rows[name]["seed_differences"]) == 2
    assert rows["base"]["seed_differences"] == [0, 0]
    runs = [path.name for path in (tmp_path / "runs" / "query").iterdir()]
    assert sorted(runs) == ["base_0", "base_1", "raw_0", "raw_1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("base", "no spred"), "variants: unknown name 'no spred'. Did you mean 'no spread'"),
        (("no start", "raw"), "variants: unknown name 'raw'"),
    ],
)
def test_unknown_variants_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        ablation.ablate(ablation.Config(variants=names))


@pytest.mark.parametrize("name", ["lenett", "vgg"])
def test_architectures_without_meta_training_victims_are_refused(name):
    with pytest.raises(ValueError, match=f"architectures: unknown name '{name}'"):
        ablation.ablate(ablation.Config(architectures=(name,)))


def test_variants_and_flags_choose_the_meta_training_victims():
    def trained(variant, **flags):
        return ablation._settings("variant", variant, 0, ablation.Config(**flags)).victims

    assert len(trained(Variant())) == 12
    assert trained(Variant(per_source=1)) == ("victims/mnist_small_cnn_0", "victims/cifar10_small_cnn_0")
    lenets = ("victims/cifar10_lenet_4", "victims/cifar10_lenet_5")
    assert trained(Variant(), sources=("cifar10",), architectures=("lenet",)) == lenets


@pytest.mark.standard_promotion
def test_variants_attack_with_the_radii_of_the_study(trained, monkeypatch):
    monkeypatch.setattr(victims, "RECIPES", TINY)
    monkeypatch.setattr(study, "STUDIES", {"hard": study.Study((), META, {"epsilon": ("digits=0.125",)})})
    flags = ablation.Config(sources=("digits",), victims=trained)
    settings = ablation._settings("base", Variant(), 0, flags)
    assert not settings.epsilon
    [family] = ablation._families(settings, flags).values()
    assert family.constraint.epsilon == 0.125


def test_reference_variant_must_be_meta_trained():
    with pytest.raises(
        ValueError, match="variants: '1 direction at test time' is not meta-trained, so it cannot be the reference"
    ):
        ablation.ablate(ablation.Config(study="query", variants=("1 direction at test time", "base")))


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_variant_names_have_no_comma(name):
    assert not any("," in variant for variant in ablation.VARIANTS[name])


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_all_variants_of_a_study_are_valid_at_equal_queries(name):
    flags, evaluations = ablation.Config(study=name), set()
    for variant in ablation.VARIANTS[name].values():
        settings = ablation._settings("variant", variant, 0, flags)
        meta_train.check(settings)
        assert not (variant.judged and (variant.flags or variant.per_source))
        settings = dataclasses.replace(settings, **variant.judged)
        tried = 2 * settings.num_directions or 1  # with exact gradients a step evaluates the images once
        evaluations.add(settings.num_steps * tried + settings.waves)
    assert len(evaluations) == 1


@pytest.mark.standard_promotion
def test_variants_with_unequal_queries_are_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(victims, "RECIPES", TINY)
    monkeypatch.setattr(study, "STUDIES", {"query": study.Study((), META, {})})
    variants = {"base": Variant(), "fewer": Variant(judged={"num_directions": 3})}
    monkeypatch.setitem(ablation.VARIANTS, "query", variants)
    flags = ablation.Config(study="query", sources=("digits",), num_tasks=2, at=(2,), victims=trained)
    flags = dataclasses.replace(
        flags,
        seeds=1,
        architectures=("small_cnn",),
        workdir=str(tmp_path / "runs"),
        output=str(tmp_path / "ablation.json"),
    )
    with pytest.raises(ValueError, match="at: after 2 steps 'fewer' has made 120 queries, 'base' 240"):
        ablation.ablate(flags)


def test_meta_steps_of_a_variant_override_the_flag():
    def meta_steps(variant, **flags):
        return ablation._settings("variant", variant, 0, ablation.Config(**flags)).meta_steps

    assert meta_steps(Variant(), meta_steps=3) == 3
    assert meta_steps(Variant({"meta_steps": 7}), meta_steps=3) == 7
    assert meta_steps(Variant()) == study.STUDIES["hard"].meta["meta_steps"]


def test_ablation_runs_of_make_results_have_different_folders():
    makefile = pathlib.Path(ablation.__file__).parents[2] / "Makefile"
    folders = {}
    for line in makefile.read_text().replace("\\\n", "").splitlines():
        if "-m experiments.studies.ablation" not in line:
            continue
        values = absl_flags.FlagValues()
        config.define_flags(ablation.Config, values)
        values(shlex.split(line)[2:])
        flags = config.read_flags(ablation.Config, values)
        for name in flags.variants or ablation.VARIANTS[flags.study]:
            if not ablation.VARIANTS[flags.study][name].judged:
                for seed in range(flags.seeds):
                    run = ablation._settings(name, ablation.VARIANTS[flags.study][name], seed, flags)
                    assert folders.setdefault(run.workdir, run) == run
    assert len(folders) > 50
