"""Attacks by queries alone: `oracle="query"`, `oracle="decision"` and `PatternAttack`, on linear victims."""

import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import AttackRecipe, Constraint, PatternAttack, ZerothOrder, models

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(64, 3)).astype(np.float32) / 4
IMAGES = RNG.uniform(0.2, 0.8, size=(10, 8, 8, 1)).astype(np.float32)
LABELS = ((IMAGES - 0.5).reshape(10, -1) @ WEIGHTS).argmax(1)
EPSILON = 0.15


def linear(images):
    return (jnp.asarray(images) - 0.5).reshape(len(images), -1) @ WEIGHTS


class Counted:
    """The victim as a NumPy function that counts its images."""

    def __init__(self, scores=lambda logits: logits):
        self.images, self.scores = 0, scores

    def __call__(self, images):
        self.images += len(images)
        return self.scores((images - 0.5).reshape(len(images), -1) @ WEIGHTS)


def run(model=linear, images=IMAGES, labels=LABELS, **options):
    return lft_jax.universal_perturbation(model, images, labels, **{"epsilon": EPSILON, "oracle": "query", **options})


def garbage(logits):
    """Scores that have nothing in common with the logits but the place of the largest one, and are never the same."""
    rng = np.random.default_rng(int(1e6 * abs(logits).sum()))
    scores = rng.normal(size=logits.shape) * 10.0 ** rng.integers(-3, 6)
    scores[np.arange(len(scores)), logits.argmax(-1)] = scores.max(-1) + rng.uniform(1e-3, 1e3, len(scores))
    return scores


@pytest.mark.parametrize("oracle", ["query", "decision"])
def test_patterns_fool_images_with_full_contrast(oracle):
    result = run(oracle=oracle, max_queries=800)
    assert result.oracle == oracle and len(result.history["asr"]) == 20
    np.testing.assert_allclose(np.abs(result.perturbation), EPSILON, rtol=1e-6)
    rate = lft_jax.attack_success_rate(linear, IMAGES, LABELS, result.perturbation)
    np.testing.assert_allclose(result.asr, rate, rtol=1e-6)
    assert rate > 0.5
    assert result.history["asr"][-1] >= result.history["asr"][0]


@pytest.mark.parametrize("oracle", ["query", "decision", PatternAttack(race=1.0)])
@pytest.mark.parametrize("budget", [2, 3, 11, 20, 57, 300, 900])
def test_queries_are_counted_and_never_above_the_limit(oracle, budget):
    victim = Counted()
    seen = []
    result = run(victim, oracle=oracle, max_queries=budget, callback=lambda entry: seen.append(entry["queries"]))
    assert victim.images == result.queries == result.history["queries"][-1] <= budget
    assert seen == result.history["queries"].tolist() == sorted(seen)
    assert result.queries > 0.6 * budget


def test_without_a_limit_an_attack_costs_no_more_than_as_many_steps():
    victim = Counted()
    result = run(victim, steps=3)
    assert victim.images == result.queries <= 10 * (1 + 3 * 21) < result.queries + 20


def test_models_in_jax_and_outside_are_attacked_alike():
    one, other = run(models.from_function(linear), max_queries=400), run(Counted(), max_queries=400)
    np.testing.assert_array_equal(one.perturbation, other.perturbation)
    np.testing.assert_array_equal(one.history["queries"], other.history["queries"])


def test_of_scores_a_decision_attack_sees_only_the_largest():
    one, other = (run(Counted(scores), oracle="decision", max_queries=600) for scores in (lambda z: z, garbage))
    np.testing.assert_array_equal(one.perturbation, other.perturbation)
    for name in one.history:
        np.testing.assert_array_equal(one.history[name], other.history[name])
    assert not np.array_equal(one.perturbation, run(Counted(), max_queries=600).perturbation)


def test_a_service_that_returns_labels_is_enough():
    class Service(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = np.asarray(next(iter(body.values())), np.float32)
            answer = np.eye(3)[np.asarray(linear(images)).argmax(-1)].tolist()
            text = json.dumps({"probabilities": answer}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        model = models.from_url(f"http://127.0.0.1:{server.server_port}", output="probabilities")
        found = run(model, oracle="decision", max_queries=200)
    finally:
        server.shutdown()
        server.server_close()
    np.testing.assert_array_equal(found.perturbation, run(oracle="decision", max_queries=200).perturbation)


@pytest.mark.parametrize(("budget", "kept"), [(500, None), (1000, False), (1000, True)])
def test_changes_have_to_outdo_the_winner_of_the_race_on_proxies(monkeypatch, budget, kept):
    """On the support images they always do; on the 30 proxies this victim says so, or the contrary."""
    winners, raced = [], PatternAttack.raced

    def noted(*args, **kwargs):
        found = raced(*args, **kwargs)
        winners.append(found.pattern)
        return found

    class Partial(Counted):
        compared = 0

        def __call__(self, images):
            logits = super().__call__(images) + np.asarray([1.5, 0, 0])
            if len(images) == 30:
                self.compared += 1  # the winner first, then the end
                logits = np.tile([-5.0 if (self.compared == 1) == kept else 5.0, 0, 0], (30, 1))
            return logits

    monkeypatch.setattr(PatternAttack, "raced", noted)
    victim, labels = Partial(), np.zeros(10, np.int32)
    result = run(victim, labels=labels, max_queries=budget)
    assert victim.images == result.queries <= budget
    assert victim.compared == (0 if kept is None else 2)
    assert np.array_equal(result.perturbation, EPSILON * winners[0]) == bool(kept)
    np.testing.assert_allclose(result.asr, lft_jax.attack_success_rate(victim, IMAGES, labels, result.perturbation))


def test_targets():
    result = run(target=2, max_queries=800)
    others = LABELS != 2
    classes = np.asarray(linear(np.clip(IMAGES + result.perturbation, 0, 1))).argmax(-1)
    assert np.mean(classes[others] == 2) > 0.5
    assert run(target=2, oracle="decision", max_queries=800).asr > 0.5


def test_an_l2_ball_is_filled():
    result = run(norm="l2", epsilon=1.2, max_queries=300)
    np.testing.assert_allclose(np.linalg.norm(result.perturbation), 1.2, rtol=1e-5)
    assert len(np.unique(np.abs(result.perturbation))) == 1


def test_labels_may_be_the_models_own():
    assert run(labels=None, max_queries=300).labelled is False
    np.testing.assert_array_equal(
        run(labels=None, max_queries=300).perturbation, run(max_queries=300).perturbation
    )  # the model is right on all


def test_many_images_are_a_part_of_them():
    images = np.random.default_rng(1).uniform(0.2, 0.8, size=(200, 8, 8, 1)).astype(np.float32)
    victim = Counted()
    result = run(victim, images, None, max_queries=500)
    assert victim.images == result.queries <= 500
    np.testing.assert_allclose(np.abs(result.perturbation), EPSILON, rtol=1e-6)


def test_the_key_decides():
    one, again, other = (
        run(max_queries=100, key=key).perturbation for key in (None, jax.random.key(0), jax.random.key(1))
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("start", [None, EPSILON * np.sign(RNG.normal(size=(8, 8, 1)).astype(np.float32))])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(start):
    whole = run(steps=6, start=start, max_queries=None)
    part = run(steps=6, start=start, callback=lambda entry: entry["step"] == 2)
    assert len(part.history["loss"]) == 2
    on = run(steps=6, start=part)
    np.testing.assert_array_equal(on.perturbation, whole.perturbation)
    np.testing.assert_array_equal(on.history["queries"][2:] - 10, whole.history["queries"][2:])
    with pytest.raises(ValueError, match="stopped with another optimizer"):
        run(steps=6, start=part, optimizer=optax.sgd(0.1))


def test_a_given_start_is_changed_and_never_gets_worse():
    start = EPSILON * np.where(RNG.uniform(size=(8, 8, 1)) < 0.5, -1, 1).astype(np.float32)
    result, victim = run(start=start, max_queries=200), Counted()
    clean = np.mean(PatternAttack().losses(np.asarray(linear(np.clip(IMAGES + start, 0, 1))), LABELS))
    found = np.mean(PatternAttack().losses(np.asarray(linear(np.clip(IMAGES + result.perturbation, 0, 1))), LABELS))
    assert found < clean
    np.testing.assert_allclose(np.abs(result.perturbation), EPSILON, rtol=1e-6)
    assert run(victim, start=start, max_queries=200).queries == victim.images <= 200


def test_an_error_keeps_the_best_pattern():
    class Fails(Counted):
        def __call__(self, images):
            if self.images > 200:
                raise ConnectionError("gone")
            return super().__call__(images)

    victim = Fails()
    with pytest.raises(ConnectionError) as caught:
        run(victim, max_queries=1000)
    partial = caught.value.partial
    assert victim.images <= partial.queries <= victim.images + 50  # the call that failed counts
    np.testing.assert_allclose(np.abs(partial.perturbation), EPSILON, rtol=1e-6)


class Noted(Counted):
    """A victim that ends the run at a number of images, and notes which patterns it has answered for which images."""

    def __init__(self, error, images):
        super().__init__()
        self.error, self.last, self.tried = error, images, {}

    def __call__(self, images):
        if self.images + len(images) > self.last:
            raise self.error
        answer = super().__call__(images)
        for image in images if self.images > len(IMAGES) else ():
            (row,) = np.flatnonzero(np.isclose(np.abs(image - IMAGES), EPSILON, atol=1e-5).all((1, 2, 3)))
            self.tried.setdefault(np.sign(image - IMAGES[row]).tobytes(), set()).add(row)
        return answer


def linear_losses(signs):
    """Of a race and of changes, `[10]`: the cross-entropy (negative), and the sigmoid of half the margin."""
    pattern = np.frombuffer(signs, np.float32).reshape(8, 8, 1)
    logits = np.asarray(linear(IMAGES + np.float32(EPSILON) * pattern), np.float64)
    true = np.take_along_axis(logits, LABELS[:, None], 1)[:, 0]
    others = np.where(np.arange(3) == LABELS[:, None], -np.inf, logits).max(1)
    return true - np.log(np.exp(logits).sum(1)), 1 / (1 + np.exp((others - true) / 2))


@pytest.mark.parametrize("error", [ConnectionError("gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("images", [120, 330, 600])
def test_an_error_in_the_first_step_keeps_the_best_pattern(error, images):
    """In the first round of the race, after the second one, and among the changes."""
    victim = Noted(error, images)
    with pytest.raises(type(error)) as caught:
        run(victim, max_queries=1000, steps=1)
    partial = caught.value.partial
    assert partial.paused is None and not partial.history
    most = max(map(len, victim.tried.values()))
    assert most == {120: 2, 330: 5, 600: 10}[images]
    which = int(images == 600)
    expected = {
        signs: linear_losses(signs)[which][list(rows)].mean()
        for signs, rows in victim.tried.items()
        if len(rows) == most
    }
    found = np.sign(partial.perturbation).tobytes()
    assert found in expected
    np.testing.assert_allclose(expected[found], min(expected.values()), rtol=1e-5)
    on = run(start=partial, max_queries=300)
    assert linear_losses(np.sign(on.perturbation).tobytes())[1].mean() <= linear_losses(found)[1].mean() + 1e-6


def test_an_error_before_any_pattern_is_known_keeps_nothing():
    with pytest.raises(ConnectionError) as caught:
        run(Noted(ConnectionError("gone"), 10), max_queries=1000)
    assert not hasattr(caught.value, "partial")


def test_an_optimizer_or_a_recipe_makes_steps_along_estimates():
    for options in ({"optimizer": optax.sgd(0.1)}, {"recipe": AttackRecipe()}, {"oracle": ZerothOrder(2)}):
        result = run(steps=2, **options)
        assert result.oracle == "query" and np.any(np.abs(np.abs(result.perturbation) - EPSILON) > 1e-6)
    penalty = Constraint("l2", penalty=0.1)
    assert run(steps=1, epsilon=None, constraint=penalty).queries == 10 * 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"oracle": "decision", "optimizer": optax.sgd(0.1)},
            "oracle: patterns of full contrast are searched in a ball",
        ),
        ({"oracle": "decision", "recipe": AttackRecipe()}, "without a recipe"),
        ({"oracle": PatternAttack(), "epsilon": None, "constraint": Constraint("l2", penalty=0.1)}, "penalty of 0.1"),
        ({"oracle": PatternAttack(race=2.0)}, "race must be in"),
        ({"max_queries": 1}, "max_queries must be at least 2, got 1"),
        ({"oracle": "decisions"}, "oracle: unknown name 'decisions'. Did you mean 'decision'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_nan_is_reported():
    with pytest.raises(ValueError, match="NaN"):
        run(lambda images: linear(images) * jnp.where(jnp.std(images) > 10, 1, jnp.nan), max_queries=100)


@pytest.mark.parametrize("oracle", ["query", "decision"])
def test_a_budget_holds_in_small_batches(oracle):
    model = Counted()
    result = run(model, oracle=oracle, batch_size=4, max_queries=50, steps=3)
    assert model.images == result.queries == result.history["queries"][-1] <= 50


def test_a_start_without_signs_and_a_key_that_is_none_are_refused():
    with pytest.raises(ValueError, match="start must not be 0 everywhere where only signs"):
        run(start=np.zeros((8, 8, 1)), max_queries=100)
    for key in (3, jnp.zeros(3), jax.random.split(jax.random.key(0))):
        with pytest.raises(TypeError, match="key must be a PRNG key"):
            run(max_queries=100, key=key)
    old, new = (run(max_queries=100, key=make(1)).perturbation for make in (jax.random.PRNGKey, jax.random.key))
    np.testing.assert_array_equal(old, new)
