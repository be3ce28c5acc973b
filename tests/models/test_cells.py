"""The table of docs/models.md: which oracle works with which adapter. Each cell is tried."""

import contextlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import evaluation, learners, models

IMAGES = np.random.default_rng(0).uniform(0.2, 0.8, (9, 4, 4, 1)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
LABELS = (IMAGES.reshape(9, -1) @ WEIGHTS).argmax(1)
TASKS = np.arange(9) % 3
ESTIMATOR = lft_jax.ZerothOrder(num_directions=2, smoothing=0.01)
ROOT = pathlib.Path(__file__).parents[2]


def table():
    """`{adapter: {column: cell}}` of the page."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    block = page.split("<!-- cells -->\n")[1].split("<!-- end of cells -->")[0]
    head, _, *rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|\n").split("|")] for line in block.splitlines()
    ]
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in rows}


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


def of_flax():
    from flax import linen

    class Linear(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3, use_bias=False)(x.reshape(len(x), -1))

    return models.from_flax(Linear(), {"params": {"Dense_0": {"kernel": jnp.asarray(WEIGHTS)}}})


def of_nnx():
    from flax import nnx

    class Linear(nnx.Module):
        def __init__(self):
            self.weights = nnx.Param(jnp.asarray(WEIGHTS))

        def __call__(self, x):
            return x.reshape(len(x), -1) @ self.weights[...]

    return models.from_nnx(Linear())


def of_equinox():
    import equinox

    class Linear(equinox.Module):
        weights: jax.Array

        def __call__(self, x):
            return x.ravel() @ self.weights

    return models.from_equinox(Linear(jnp.asarray(WEIGHTS)))


def of_torch():
    import torch

    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.from_numpy(WEIGHTS.T.copy()))
    return models.from_torch(module)


def of_keras():
    import keras

    layers = keras.layers.Flatten(), keras.layers.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((4, 4, 1)), *layers])
    model.set_weights([WEIGHTS])
    return models.from_keras(model)


def of_onnx():
    from onnx import TensorProto, helper, numpy_helper

    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 1, 4, 4))
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 3))
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    graph = helper.make_graph(nodes, "linear", [given], [found], [numpy_helper.from_array(WEIGHTS, "w")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return models.from_onnx(made.SerializeToString())


def of_sklearn():
    from sklearn.linear_model import LogisticRegression

    estimator = LogisticRegression().fit(IMAGES.reshape(9, -1), TASKS)
    estimator.coef_, estimator.intercept_ = WEIGHTS.T.astype(np.float64), np.zeros(3)
    return models.from_sklearn(estimator)


class Service(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        x = np.asarray(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["instances"], np.float32)
        body = json.dumps({"predictions": linear(x).tolist()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield models.from_url(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


MAKERS = {
    "a JAX function": lambda: linear,
    "a NumPy function": lambda: lambda x: linear(np.asarray(x)),
    "from_function": lambda: models.from_function(linear),
    "from_flax": of_flax,
    "from_nnx": of_nnx,
    "from_equinox": of_equinox,
    "from_torch": of_torch,
    "from_keras, JAX": of_keras,
    "from_keras, torch": of_keras,
    "from_onnx": of_onnx,
    "from_sklearn": of_sklearn,
    "from_url": served,
}
HEAVY = {name for name in MAKERS if re.match("from_(torch|keras|onnx)", name)}
HERE = os.environ.get("KERAS_BACKEND", "jax")


def test_the_table_names_every_adapter():
    assert list(table()) == list(MAKERS)
    adapters = {name for name in models.__all__ if name.startswith("from_")}
    assert adapters == {name.partition(",")[0] for name in MAKERS if name.startswith("from_")}


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.frameworks) if name in HEAVY else name for name in MAKERS],
)
def test_a_row(name, monkeypatch):
    backend = {"from_keras, JAX": "jax", "from_keras, torch": "torch"}.get(name, HERE)
    if backend != HERE:  # keras has one backend in a process
        command = [sys.executable, "-m", "pytest", "-q", "-m", "frameworks", f"{__file__}::test_a_row[{name}]"]
        subprocess.run(command, env=os.environ | {"KERAS_BACKEND": backend}, check=True, cwd=ROOT)
        return
    if "keras" in name:
        monkeypatch.setenv("KERAS_BACKEND", backend)
    made = MAKERS[name]()
    with made if hasattr(made, "__enter__") else contextlib.nullcontext(made) as model:
        found = {column: tried(model) for column, tried in COLUMNS.items()}
    assert found == {column.replace("`", ""): cell for column, cell in table()[name].items()}


def attacked(model, oracle):
    options = {"epsilon": 0.1, "steps": 2, "optimizer": optax.sgd(0.1), "key": jax.random.key(0)}
    recipe = lft_jax.AttackRecipe(augmentation=None)
    with jax.numpy_rank_promotion("allow"):  # layers of Keras rely on it
        found = lft_jax.universal_perturbation(model, IMAGES, LABELS, oracle=oracle, recipe=recipe, **options)
        expected = lft_jax.universal_perturbation(linear, IMAGES, LABELS, oracle=found.oracle, recipe=recipe, **options)
    np.testing.assert_allclose(found.perturbation, expected.perturbation, atol=1e-4)
    return found.oracle


def refused(call):
    """What a call that works returns, or "refused" for an error that says what to do."""
    try:
        return call()
    except ValueError as error:
        assert re.search(
            r"has no gradients|cannot be (traced|differentiated) by JAX|model has no gradients", str(error)
        )
        return "refused"


def fine_tuned(model, estimator):
    options = {"ways": 3, "query_shots": 2, "epsilon": 0.1, "estimator": estimator}
    learner, keys = learners.fixed("sgd", optax.sgd), jax.random.split(jax.random.key(0), 2)
    losses = []
    for victim in (model, linear):
        with jax.numpy_rank_promotion("allow"):
            family = lft_jax.uap_family(IMAGES, TASKS, victim, **options)
            found = evaluation.evaluate(learner, {"learning_rate": 0.1}, family, keys, num_steps=2, at=(2,))
        losses.append(found["loss"])
    # Logarithms of probabilities are logits but for a constant of each image, which the hinge does not see.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    return "works"


def automatic(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = attacked(model, "auto")
    warned = any("cannot differentiate" in str(warning.message) for warning in caught)
    assert warned == (found == "query" and not isinstance(model, models.Classifier))
    return found


COLUMNS = {
    'oracle="gradient"': lambda m: refused(lambda: "works" if attacked(m, "gradient") else ""),
    'oracle="query"': lambda m: refused(lambda: "works" if attacked(m, "query") else ""),
    'oracle="auto"': automatic,
    "uap_family": lambda m: refused(lambda: fine_tuned(m, None)),
    "uap_family(estimator=)": lambda m: refused(lambda: fine_tuned(m, ESTIMATOR)),
}
