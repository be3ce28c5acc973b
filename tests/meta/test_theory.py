"""The gap between the meta-gradients of LFT and L2O, where it is known in closed form."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import train_victim
from experiments.report import render
from experiments.studies import theory_gap
from lft_jax.base import Learner
from lft_jax.meta import learners, theory
from lft_jax.meta.outer_loss import outer_losses, step_weights
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.tasks.quadratic import quadratic_family

CURVATURE = np.asarray([0.5, 1.0, 2.0])
NOISE = 0.7


def descent(learning_rate):
    """Gradient descent whose rate is the one meta-parameter."""
    return optax.stateless(lambda grads, theta: jax.tree.map(lambda g: -learning_rate * g, grads))


DESCENT = Learner("descent", lambda key, families: jnp.asarray(0.1), descent, lambda params, f, key: f.init(key))


def family(count):
    return quadratic_family(CURVATURE, center=1.0, noise=NOISE, support=count, query=count)


def test_the_gap_of_one_step_is_the_closed_form(x64):
    # theta_1 = r a s for the means s and q of the examples, so the gap's derivative is (a s) . a (s - q).
    keys = jax.random.split(jax.random.key(0), 5)
    found = theory.meta_gradient_gap(DESCENT, jnp.asarray(0.1), family(4), keys, num_steps=1)
    for index, key in enumerate(keys):
        episode = family(4).sample(jax.random.split(key, 3)[0])  # as in `run_task`
        s, q = (np.asarray(data).mean(0) for data in episode)
        np.testing.assert_allclose(found.gaps[index], np.abs(np.sum(CURVATURE**2 * s * (s - q))))
        np.testing.assert_allclose(found.norms[index], np.abs(np.sum(CURVATURE**2 * s * (0.1 * CURVATURE * s - q))))
        for data, variance in zip(episode, (found.support_variance, found.query_variance), strict=True):
            expected = np.sum(CURVATURE**2 * np.asarray(data).var(0, ddof=1)) / 4
            np.testing.assert_allclose(variance[index], expected)


def test_the_mean_gap_is_the_bias_of_the_support_gradient(x64):
    # E[(a s) . a (s - q)] = sum(a^2) noise^2 / n: in the mean over tasks it falls with n, not with its root.
    keys = jax.random.split(jax.random.key(1), 20_000)
    for count in (2, 8):
        found = theory.meta_gradient_gap(DESCENT, jnp.asarray(0.1), family(count), keys, num_steps=1, batch_size=1000)
        expected = np.sum(CURVATURE**2) * NOISE**2 / count
        sampling = np.sqrt(np.mean(np.square(found.gaps)) / len(keys))
        assert abs(found.mean_gap - expected) < 4 * sampling < 0.2 * expected


@pytest.mark.parametrize("weighting", ["uniform", "final"])
def test_the_gap_is_the_difference_of_the_meta_gradients_of_training(x64, weighting):
    rule, keys = coordinate_lstm(3, 1, features="raw", output_scale=0.5), jax.random.split(jax.random.key(2), 3)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), rule.init(jax.random.key(3)))

    def gradients(learner):
        def total(params, key):
            losses = outer_losses(learner, params, family(3), key[None], num_steps=4, steps=np.arange(4))
            return losses[0] @ step_weights(weighting, 4)

        return [jax.grad(total)(params, key) for key in keys]

    lft, l2o = gradients(learners.lft(rule)), gradients(learners.l2o(rule))
    gaps = [jax.tree.map(jnp.subtract, a, b) for a, b in zip(lft, l2o, strict=True)]
    found = theory.meta_gradient_gap(learners.l2o(rule), params, family(3), keys, num_steps=4, step_weights=weighting)
    np.testing.assert_allclose(found.gaps, [optax.tree.norm(g) for g in gaps], rtol=1e-9)
    np.testing.assert_allclose(found.norms, [optax.tree.norm(g) for g in lft], rtol=1e-9)
    np.testing.assert_allclose(found.mean_gap, optax.tree.norm(jax.tree.map(lambda *g: sum(g) / 3, *gaps)), rtol=1e-9)
    np.testing.assert_allclose(found.mean_norm, optax.tree.norm(jax.tree.map(lambda *g: sum(g) / 3, *lft)), rtol=1e-9)


def test_on_one_task_the_gap_falls_with_the_root_of_the_number_of_examples(x64):
    keys, counts = jax.random.split(jax.random.key(4), 300), (4, 16, 64)
    options = {"num_steps": 5, "batch_size": 100}
    gaps = [theory.meta_gradient_gap(DESCENT, jnp.asarray(0.2), family(n), keys, **options).gaps for n in counts]
    decay = theory.fit_decay(counts, np.stack(gaps))
    assert decay.low < 0.5 < decay.high
    assert decay.high - decay.low < 0.2


def test_variances_of_one_example_are_unknown():
    single = dataclasses.replace(family(1), curvature=jnp.ones(3, jnp.float32))
    keys = jax.random.split(jax.random.key(0), 2)
    found = theory.meta_gradient_gap(DESCENT, jnp.float32(0.1), single, keys, num_steps=1)
    assert np.all(np.isnan(found.support_variance))
    assert np.all(np.isfinite(found.gaps))


def test_a_power_law_is_recovered_and_its_interval_covers_it():
    counts, generator = np.asarray([1, 3, 10, 30]), np.random.default_rng(0)
    exact = np.repeat(5.0 * counts[:, None] ** -0.8, 7, axis=1)
    np.testing.assert_allclose(theory.fit_decay(counts, exact, resamples=3), 0.8)
    noisy = exact[:, :1] * generator.lognormal(0, 0.5, (4, 200))
    decay = theory.fit_decay(counts, noisy)
    assert decay.low < decay.exponent < decay.high
    assert decay.low < 0.8 < decay.high < decay.low + 0.1


@pytest.mark.parametrize("counts, values", [([1, 1], np.ones((2, 3))), ([1, 2], np.ones((3, 3))), ([1], np.ones(3))])
def test_a_fit_needs_counts_that_differ(counts, values):
    with pytest.raises(ValueError, match=r"values must be \[N, T\] for N >= 2 different counts"):
        theory.fit_decay(counts, values)


def test_a_fit_needs_positive_values():
    with pytest.raises(ValueError, match="values and counts must be above 0"):
        theory.fit_decay([1, 2], np.zeros((2, 3)))


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match=r"step_weights: unknown name 'unifrom'\. Did you mean 'uniform'"):
        theory.meta_gradient_gap(
            DESCENT,
            jnp.asarray(0.1),
            family(2),
            jax.random.split(jax.random.key(0), 2),
            num_steps=1,
            step_weights="unifrom",
        )


@pytest.mark.standard_promotion
def test_the_binary_writes_results_and_a_figure(tmp_path):
    victim, output = str(tmp_path / "victim"), tmp_path / "gap.json"
    train_victim.train(train_victim.Config(source="digits", epochs=1, output=victim))
    flags = theory_gap.Config(victim=victim, output=str(output), shots=(1, 3), num_steps=2, num_tasks=3)
    theory_gap.measure(flags)
    results = json.loads(output.read_text())
    assert [row["images"] for row in results["rows"]["untrained"]] == [10, 30]
    assert results["decay"].keys() == {"untrained", "meta-trained"}
    assert output.with_suffix(".png").stat().st_size > 10_000

    document = tmp_path / "results.md"
    document.write_text("before <!-- results --> old <!-- end of results --> after")
    results["provenance"]["command"] = "python -m experiments.studies.theory_gap --victim=x"
    output.write_text(json.dumps(results))
    render.render(render.Config(results=(str(output),), document=str(document)))
    text = document.read_text()
    assert text.startswith("before <!-- results -->\n## The gap between LFT and L2O")
    assert f"to the power of -{results['decay']['untrained']['exponent']:.3f}" in text
    assert f"| 30 | {results['rows']['meta-trained'][1]['gaps']['mean']:.3g} |" in text
    assert text.endswith("<!-- end of results --> after")
    assert "old" not in text
