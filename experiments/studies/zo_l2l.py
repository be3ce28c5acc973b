r"""Repeats ZO-L2L, query-only attacks on single MNIST images (Ruan et al. 2020, arXiv 1910.09464, section 4.1).

  python -m experiments.studies.zo_l2l

First a learned fine-tuner (their UpdateRNN) is meta-trained on raw zeroth-order estimates. Then its weights are fixed
and a sampler (their QueryRNN) is meta-trained, which sets the deviation of the directions. Both are compared on test
images with ZO-SGD, ZO-signSGD and ZO-Adam, at published and at tuned learning rates, and with guided ES instead of the
sampler. All attack the victim of the meta-training, as published.

Differences to the authors' code:

- The victim is a small CNN of this library.
- Numbers are float32, so the smoothing is 1e-4 instead of 1e-6.
- There is one meta-update per trajectory, from all its windows together, instead of one per window.
- LSTMs have biases.
- The output of the sampler has no penalty.
- At test time the sampler is used at every step; theirs is used at a random half of the steps.

Killed, it goes on after the last finished meta-training, tuning or attack.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lft_jax
from experiments import config
from experiments.cells import Cells
from experiments.report import figures
from lft_jax import evaluation, learners
from lft_jax.base import Learner
from lft_jax.cli import provenance
from lft_jax.data import load_source
from lft_jax.optimizers import sampling
from lft_jax.tasks.single_image import SingleImageFamily, single_image_family
from lft_jax.victims import load_victim

#: Optimizers and their published learning rates times d, the number of coordinates.
BASELINES = {
    "zo_sgd": (optax.sgd, 4.0),
    "zo_signsgd": (optax.sign_sgd, 8.0),
    "zo_adam": (functools.partial(optax.adam, b1=0.9, b2=0.996), 8.0),
}
#: Learning rates tried, times d.
RATES = tuple(2.0**power for power in range(-1, 9))


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/zo_l2l.json", "Results file. The figure is put beside it.")
    victim: str = config.option("victims/mnist_small_cnn_0", "Folder of the victim.")
    seed: int = config.option(0, "Seed of the meta-training.")
    update_steps: int = config.option(500, "Meta-steps (trajectories) of the UpdateRNN.")
    query_steps: int = config.option(250, "Meta-steps (trajectories) of the QueryRNN.")
    output_scale: float = config.option(1.0, "Factor on the output of the UpdateRNN.")
    num_steps: int = config.option(200, "Steps of an attack (K).")
    window: int = config.option(20, "Steps of truncated backpropagation.")
    meta_images: int = config.option(1000, "Training images for meta-training and tuning.")
    images: int = config.option(10, "Test images to attack.")
    runs: int = config.option(10, "Attacks per image.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def zo_l2l(flags: Config) -> dict[str, Any]:
    """Runs the experiment, writes its files and returns the results."""
    victim = load_victim(flags.victim)
    cells = Cells(flags.output, {**dataclasses.asdict(flags), "victim": victim.card})
    results = {
        "provenance": cells.provenance([flags.seed]),
        "victim": victim.card,
        "flags": dataclasses.asdict(flags),
        "meta_training": {},
        "rows": [],
    }
    del results["flags"]["data_dir"]
    train, test = (load_source(victim.card["source"], split, data_dir=flags.data_dir) for split in ("train", "test"))
    count = flags.meta_images
    family = single_image_family(train.images[:count], train.labels[:count], victim.logits_fn)
    attacked = single_image_family(test.images[: 20 * flags.images], test.labels[: 20 * flags.images], victim.logits_fn)

    update_rnn = lft_jax.coordinate_lstm(10, 1, features="raw", output_scale=flags.output_scale)
    update, both = learners.l2o(update_rnn), learners.l2o(update_rnn, sampler=sampling.QUERY_RNN)
    rule, losses = cells.get("update_rnn", _meta_trained, update, optax.adam(1e-3), family, flags, flags.update_steps)
    results["meta_training"]["update_rnn"] = losses
    stages = {"train": optax.adam(5e-3), "hold": optax.set_to_zero()}
    second_stage = optax.partition(stages, {"rule": "hold", "sampler": "train"})
    arguments = both, second_stage, family, flags, flags.query_steps, rule
    weights, losses = cells.get("query_rnn", _meta_trained, *arguments)
    results["meta_training"]["query_rnn"] = losses

    guided = dataclasses.replace(
        update,
        name="guided",
        optimizer=lambda params: sampling.guided(lft_jax.learned_fine_tuner(params, update_rnn)),
    )
    methods = {
        "update_rnn": (update, rule, {}),
        "update_rnn + query_rnn": (both, weights, {}),
        "update_rnn + guided": (guided, rule, {}),
    }
    methods |= _baselines(family, flags, cells)
    found = {}
    for name, (learner, params, setting) in methods.items():
        found[name] = cells.get(f"attacks, {name}", _all_attacks, learner, params, attacked, flags)
        results["rows"].append({"method": name, **setting, **_row(found[name], found["update_rnn"])})
        results["rows"].sort(key=lambda row: row["loss"][-1])
        provenance.write_json(flags.output, results)  # after each method, so that an interrupted run keeps its rows
        print(f"{name}: {found[name]['loss'][..., -1].mean():.3f}", flush=True)
    figures.zo_l2l(results, Path(flags.output).with_suffix(".png"))
    cells.finish()
    return results


def _all_attacks(learner, params, attacked, flags):
    """Metrics `{name: [images, runs, K]}`."""
    each = [
        _attacks(learner, params, _only(attacked, number), flags.runs, flags, seed=2 + number)
        for number in range(flags.images)
    ]
    return {metric: np.stack([of_image[metric] for of_image in each]) for metric in each[0]}


def _baselines(family, flags, cells):
    """The baselines with published and with tuned learning rates: `{name: (learner, params, notes)}`."""
    methods, size = {}, family.images[0].size
    for name, (make, published) in BASELINES.items():
        learner = learners.fixed(name, make)
        scores = cells.get(f"tuning, {name}", _scores, learner, family, flags)
        chosen = RATES[int(np.argmin(scores))]
        print(f"{name}: learning rate {chosen} / d, losses {dict(zip(RATES, scores, strict=True))}", flush=True)
        methods[name] = (learner, _rate(published, size), {"rate_times_d": published})
        setting = {"rate_times_d": chosen, "settings_tried": len(RATES), "tuning_losses": scores}
        methods[f"{name} (tuned)"] = (learner, _rate(chosen, size), setting)
    return methods


def _scores(learner, family, flags):
    """The final loss of each learning rate."""
    size = family.images[0].size
    tried = [_attacks(learner, _rate(c, size), family, flags.images, flags, seed=1) for c in RATES]
    return [float(np.nan_to_num(found["loss"][:, -1].mean(), nan=np.inf)) for found in tried]


def _meta_trained(learner: Learner, optimizer, family, flags, meta_steps, rule=None):
    """The meta-parameters, from the weights of `rule` if given, and the curve of the outer loss."""
    trainer = lft_jax.meta_trainer(
        learner,
        [family],
        num_steps=flags.num_steps,
        tasks_per_family=1,
        meta_optimizer=optax.chain(optax.clip(1.0), optimizer),
        unroll=lft_jax.Unroll("linear", flags.window),
    )
    state = trainer.init(jax.random.key(flags.seed))
    if rule is not None:
        state = state._replace(params={**state.params, "rule": rule})
    losses = []
    for step in range(meta_steps):
        state, metrics = trainer.step(state)
        losses.append(float(metrics["loss"]))
        if (step + 1) % 50 == 0:
            print(f"{learner.name}, meta-step {step + 1}: {np.mean(losses[-50:]):.3f}", flush=True)
    return state.params, [float(np.mean(part)) for part in np.array_split(losses, max(1, meta_steps // 20))]


def _rate(times_d, size):
    return {"learning_rate": np.float32(times_d / size)}


def _only(family: SingleImageFamily, number: int) -> SingleImageFamily:
    part = slice(number, number + 1)
    return dataclasses.replace(family, images=family.images[part], labels=family.labels[part])


def _attacks(learner, params, family, count, flags, seed):
    """Metrics `{name: [count, K]}` of `count` attacks. The seed is far from those of meta-training."""
    keys = jax.random.split(jax.random.key(2**31 - seed), count)
    at = tuple(range(1, flags.num_steps + 1))
    found = evaluation.evaluate(learner, params, family, keys, num_steps=flags.num_steps, at=at)
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def _row(found, reference):
    """A row of results: means and intervals of metrics `[images, runs, K]`."""
    by_run, by_image = found["loss"].mean(0), found["loss"].mean(1)
    means, widths = zip(*(evaluation.mean_interval(column) for column in by_run.T), strict=True)
    return {
        "loss": means,
        "loss_interval": widths,  # over runs, of the mean over images
        "success": found["success"].mean((0, 1)).tolist(),
        "queries": found["queries"].mean((0, 1)).tolist(),
        "final_loss_by_image": by_image[:, -1].tolist(),
        "difference_to_update_rnn": evaluation.mean_interval(by_image[:, -1] - reference["loss"].mean(1)[:, -1]),
        **{kind: float(found[kind][..., -1].mean()) for kind in ("l1", "l2", "linf")},
    }


if __name__ == "__main__":
    config.main(Config, zo_l2l)
