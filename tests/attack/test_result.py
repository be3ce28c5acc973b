"""The result of an attack, runs that end early, and runs that go on."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import UniversalPerturbation, universal_perturbation
from lft_jax.tasks.perturbation import Constraint

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(6, 4, 4, 1)).astype(np.float32)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
LABELS = (IMAGES.reshape(6, -1) @ WEIGHTS).argmax(1)
RECIPE = lft_jax.AttackRecipe(augmentation=lft_jax.Augmentation(noise=0.05))
OPTIMIZER = optax.chain(optax.trace(0.5), optax.scale_by_sign(), optax.scale(-0.02))
QUERY = lft_jax.ZerothOrder(num_directions=2, smoothing=0.01, per_example=True)


OTHER = {"optimizer": OPTIMIZER, "recipe": RECIPE}
PENALTY = Constraint("l2", penalty=0.1)


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


class Service:
    """A NumPy model that counts images, and raises once it was asked for `limit` of them."""

    def __init__(self, limit=np.inf, error=ConnectionError):
        self.images, self.limit, self.error = 0, limit, error

    def __call__(self, images):
        if self.images + len(images) > self.limit:
            raise self.error("gone")
        self.images += len(images)
        return np.asarray(linear(images))


def run(model=linear, **options):
    options = {"epsilon": 0.1, "steps": 8, "optimizer": OPTIMIZER, "recipe": RECIPE, "progress": False, **options}
    return universal_perturbation(model, IMAGES, LABELS, **options)


@pytest.mark.parametrize("oracle", ["gradient", QUERY])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(oracle):
    whole = run(oracle=oracle)
    part = run(oracle=oracle, callback=lambda entry: entry["step"] == 3)
    assert len(part.history["loss"]) == 3 and part.paused.done == 3
    rest = run(oracle=oracle, start=part)
    np.testing.assert_array_equal(rest.perturbation, whole.perturbation)
    for name, values in whole.history.items():
        extra = len(IMAGES) * (np.arange(8) >= 3) if name == "queries" else 0  # the clean images again
        np.testing.assert_allclose(rest.history[name], values + extra)
    assert rest.paused is None and whole.paused is None
    assert rest.queries == rest.history["queries"][-1]


def test_a_run_that_stopped_goes_on_only_as_it_began():
    part = run(callback=lambda entry: entry["step"] == 3)
    with pytest.raises(ValueError, match="start is a result that stopped with another optimizer"):
        run(start=part, optimizer=optax.adam(0.1))
    with pytest.raises(ValueError, match="steps must be above 3, those that start has done, got 3"):
        run(start=part, steps=3)
    with pytest.raises(ValueError, match=r"start must be of images \(5, 4, 1\), got a result \(4, 4, 1\)"):
        images = np.full((6, 5, 4, 1), 0.5, np.float32)
        universal_perturbation(lambda x: x.mean((2, 3)), images, epsilon=0.1, start=part, progress=False)


@pytest.mark.parametrize("options", [{}, {"oracle": "query", "optimizer": "uap-linf", "recipe": None}])
def test_a_run_that_stopped_goes_on_in_its_ball_and_on_its_model_only(options):
    part = run(callback=lambda entry: entry["step"] == 3, max_queries=200, **options)
    for ball in ({"epsilon": 0.02}, {"norm": "l2", "epsilon": 0.1}, {"epsilon": None, "constraint": PENALTY}):
        with pytest.raises(ValueError, match="start is a result that stopped within Constraint"):
            run(start=part, **{**OTHER, **ball} if "constraint" in ball else {**options, **ball}, max_queries=200)

    def other(images):
        return linear(images)[:, ::-1] / 2 - 1

    with pytest.raises(ValueError, match="stopped with another model, other images, labels or key"):
        universal_perturbation(other, IMAGES, epsilon=0.1, steps=8, start=part, progress=False, **{**OTHER, **options})
    with pytest.raises(ValueError, match="stopped with another model, other images, labels or key"):
        images = IMAGES[::-1]
        universal_perturbation(
            linear, images, LABELS[::-1], epsilon=0.1, steps=8, start=part, progress=False, **{**OTHER, **options}
        )
    again = run(start=part.perturbation, epsilon=0.02, max_queries=200)
    assert np.abs(again.perturbation).max() <= 0.02 + 1e-7


def test_a_run_that_cannot_go_on_keeps_what_was_found():
    part = run(callback=lambda entry: entry["step"] == 3)
    same = run(start=part, max_queries=part.queries)  # paid already: no step is left
    np.testing.assert_array_equal(same.perturbation, part.perturbation)
    assert same.paused.done == 3 and str(same).splitlines()[:3] == str(part).splitlines()[:3]
    with pytest.raises(ConnectionError) as caught:
        run(model=Service(limit=len(IMAGES)), oracle=QUERY, start=run(oracle=QUERY, callback=lambda entry: True))
    assert caught.value.partial.paused.done == 1 and len(caught.value.partial.history["loss"]) == 1


def test_a_finished_result_or_an_array_is_a_new_start():
    first = run(steps=2)
    again = run(steps=2, start=first)
    np.testing.assert_array_equal(again.perturbation, run(steps=2, start=first.perturbation).perturbation)
    assert again.history["loss"][0] < first.history["loss"][0]
    large = run(steps=1, start=np.full((4, 4, 1), 0.5, np.float32), optimizer=optax.sgd(0.0))
    np.testing.assert_allclose(large.perturbation, 0.1)  # projected
    for wrong in (np.zeros((4, 4)), np.full((4, 4, 1), np.nan)):
        with pytest.raises(ValueError, match=r"start must be a finite perturbation \(4, 4, 1\), got"):
            run(start=wrong)


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_an_error_keeps_what_was_found(error):
    service = Service(limit=6 + 2 * 30 + 20, error=error)  # the clean images, two steps, and a part of the third
    # What was asked for counts, answered or not.
    with pytest.raises(error, match="gone") as caught:
        run(service, oracle=QUERY)
    partial = caught.value.partial
    assert partial.queries == service.images + 6 > partial.history["queries"][-1]
    assert len(partial.history["loss"]) == 2 and partial.paused.done == 2
    assert any(
        "stopped after 2 of 8 steps" in note and "start=error.partial" in note for note in caught.value.__notes__
    )
    whole, rest = run(Service(), oracle=QUERY), run(Service(), oracle=QUERY, start=partial)
    np.testing.assert_array_equal(rest.perturbation, whole.perturbation)
    assert rest.queries == partial.queries + 6 + 6 * 30


def test_the_best_perturbation_so_far_is_that_of_the_highest_success():
    service = Service(limit=6 + 30 * 5)
    with pytest.raises(ConnectionError) as caught:
        run(service, oracle=QUERY, optimizer=optax.sgd(-0.05))
    history = caught.value.partial.history
    best = max(range(5), key=lambda k: (history["asr"][k], -history["loss"][k]))
    clean = linear(IMAGES).argmax(1) == LABELS
    attacked = linear(np.clip(IMAGES + caught.value.partial.perturbation, 0, 1)).argmax(1)
    np.testing.assert_allclose(np.mean((attacked != LABELS)[clean]), history["asr"][best])
    assert best < 4  # steps uphill: the first one is the best


def test_an_error_in_the_search_keeps_the_best_wave():
    recipe = lft_jax.AttackRecipe(augmentation=None, search=lft_jax.WaveSearch.within(40))
    service = Service(limit=6 + 6 * 20)
    with pytest.raises(ConnectionError) as caught:
        run(service, oracle=QUERY, recipe=recipe)
    partial = caught.value.partial
    assert partial.queries == service.images + 6 == 6 * 22
    np.testing.assert_allclose(np.abs(partial.perturbation), 0.1, rtol=1e-6)
    zero = lft_jax.AttackLoss("cross_entropy")(linear(IMAGES), LABELS).mean()
    found = lft_jax.AttackLoss("cross_entropy")(linear(np.clip(IMAGES + partial.perturbation, 0, 1)), LABELS).mean()
    assert found < zero
    rest = run(Service(), oracle=QUERY, recipe=recipe, start=partial)
    assert len(rest.history["loss"]) == 8


def test_the_progress_is_reported():
    entries = []
    result = run(progress=entries.append, steps=3)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    np.testing.assert_array_equal([entry["loss"] for entry in entries], result.history["loss"])


def test_a_bar_is_shown_where_the_terminal_can(capsys, monkeypatch):
    run(progress=True, steps=2)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run(progress=True, steps=2)
    shown = capsys.readouterr().err
    assert "universal perturbation" in shown and "2/2" in shown and "ASR" in shown
    run(progress=False, steps=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [4, 5, 6, 100])
@pytest.mark.parametrize("kind", ["jax", "host"])
def test_batches_change_nothing_but_the_calls(kind, size):
    sizes = []

    def values(images):
        sizes.append(len(images))
        return linear(images)

    def pull_back(images):
        return values(images), lambda cotangent: (cotangent @ WEIGHTS.T).reshape(images.shape)

    if kind == "jax":
        model = lft_jax.models.from_function(linear)
    else:
        model = lft_jax.models.host_classifier(lft_jax.models.HostModel(values, pull_back))
    found = run(model, batch_size=size)
    np.testing.assert_allclose(found.perturbation, run().perturbation, atol=1e-6)
    if kind == "host":
        assert found.oracle == "gradient" and set(sizes) == {min(size, 6)}


def test_a_result_prints_itself():
    text = str(run())
    assert "[4, 4, 1], linf ball of radius 0.1 (25.5/255), 8 of 8 steps by gradient" in text
    assert f"evaluations of the model on one image: {6 + 8 * 12};" in text
    result = run()
    for word in (
        f"(ASR) {result.asr:.2f}",
        f"fooling rate {result.fooling_rate:.2f}",
        "clean accuracy 1.00",
        "linf 0.1",
    ):
        assert word in text
    penalty = UniversalPerturbation(np.zeros((2, 2, 1)), {}, Constraint("l1", penalty=0.5), labelled=False)
    assert "l1 penalty 0.5" in str(penalty) and "ASR)" not in str(penalty)


def test_a_perturbation_is_applied_within_its_ball():
    theta = RNG.uniform(-8 / 255, 8 / 255, size=(4, 4, 1)).astype(np.float32)
    theta[0, 0], theta[1, 1] = 8 / 255, -8 / 255
    result = UniversalPerturbation(theta, {}, Constraint("linf", 8 / 255))
    images = RNG.integers(0, 256, size=(20, 4, 4, 1)).astype(np.uint8)
    applied = result.apply(images)
    assert applied.dtype == np.uint8
    change = applied.astype(int) - images
    assert np.abs(change).max() == 8
    inside = (images > 8) & (images < 247)
    assert np.all(np.abs(change - 255 * theta[None])[inside] < 1)
    floating = result.apply(images / np.float32(255))
    np.testing.assert_allclose(floating, np.clip(images / np.float32(255) + theta, 0, 1), atol=1e-7)
    with pytest.raises(ValueError, match=r"images must be \[N, 4, 4, 1\], got \(1, 3, 3, 1\)"):
        result.apply(np.zeros((1, 3, 3, 1)))
    with pytest.raises(ValueError, match="images must be uint8 or floating-point, got int64"):
        result.apply(np.zeros((1, 4, 4, 1), np.int64))
    with pytest.raises(ValueError, match="images must be uint8 or floating-point, got bool"):
        result.apply(np.zeros((1, 4, 4, 1), bool))
    half = jnp.asarray(images / np.float32(255), jnp.bfloat16)
    assert result.apply(half).dtype == half.dtype
    picture = result.to_uint8()
    assert picture.dtype == np.uint8 and picture[0, 0] == 255 and picture[1, 1] == 1
    np.testing.assert_allclose((picture.astype(float) - 128) / 127 * (8 / 255), theta, atol=8 / 255 / 127)
    assert np.all(UniversalPerturbation(0 * theta, {}, Constraint("linf", 0.1)).to_uint8() == 128)


def test_a_result_is_saved_and_loaded(tmp_path):
    for result in (run(), run(epsilon=None, constraint=Constraint("l1", penalty=0.01), oracle=QUERY)):
        result.save(tmp_path / "uap.npz")
        loaded = UniversalPerturbation.load(tmp_path / "uap.npz")
        np.testing.assert_array_equal(loaded.perturbation, result.perturbation)
        assert loaded.history.keys() == result.history.keys()
        np.testing.assert_array_equal(loaded.history["loss"], result.history["loss"])
        assert loaded.constraint == result.constraint and str(loaded) == str(result)
        result.save(tmp_path / "uap.npy")
        np.testing.assert_array_equal(np.load(tmp_path / "uap.npy"), result.perturbation)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["uap.npy", "uap.npz"]
    with pytest.raises(ValueError, match=r"path must end with .npy or .npz, got '.*uap.png'"):
        result.save(tmp_path / "uap.png")
    np.savez(tmp_path / "images.npz", images=IMAGES)
    (tmp_path / "text.npz").write_text("text")
    for name in ("uap.npy", "images.npz", "text.npz"):
        with pytest.raises(ValueError, match=f"path: .*{name} is no .npz file of a result"):
            UniversalPerturbation.load(tmp_path / name)


def test_a_perturbation_in_bfloat16_is_saved_as_float32(tmp_path):
    theta = np.asarray([[[0.25]]], jnp.bfloat16)
    result = UniversalPerturbation(theta, {}, Constraint("linf", 0.25))
    for name in ("uap.npz", "uap.npy"):
        result.save(tmp_path / name)
    stored = UniversalPerturbation.load(tmp_path / "uap.npz").perturbation, np.load(tmp_path / "uap.npy")
    assert all(found.dtype == np.float32 and found == 0.25 for found in stored)
