"""`from_onnx` against onnxruntime and NumPy, and on a public model; run by `make test-frameworks`."""

import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lft_jax
from lft_jax.data import load_source
from lft_jax.models import from_onnx

pytestmark = pytest.mark.frameworks
SHARED = Path(os.environ.get("LFT_SHARED_DIR", ""))
IMAGES = np.random.default_rng(0).uniform(size=(5, 4, 4, 3)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(48, 3)).astype(np.float32)
INPUT = ("images", "FLOAT", ("n", 3, 4, 4))


def onnx_bytes(inputs=(INPUT,), outputs=("scores",), weights=WEIGHTS):
    """A linear model `x.reshape(N, -1) @ weights` of its first input; a second output is twice the first."""
    from onnx import TensorProto, helper, numpy_helper

    given = [helper.make_tensor_value_info(n, getattr(TensorProto, kind), shape) for n, kind, shape in inputs]
    batch, columns = inputs[0][2][0], weights.shape[1]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (batch, columns)) for name in outputs]
    nodes = [
        helper.make_node("Flatten", [inputs[0][0]], ["flat"]),
        helper.make_node("Cast", ["flat"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["single", "weights"], [outputs[0]]),
        *(helper.make_node("Add", [name, name], [twice]) for name, twice in itertools.pairwise(outputs)),
    ]
    graph = helper.make_graph(nodes, "linear", given, shapes, [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


def test_a_path_bytes_and_a_session_are_one_model(tmp_path):
    import onnxruntime

    given = onnx_bytes()
    (tmp_path / "model.onnx").write_bytes(given)
    session = onnxruntime.InferenceSession(given)
    for model in (given, session, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        found = from_onnx(model)
        assert (found.num_classes, found.input_shape, found.differentiable) == (3, (4, 4, 3), False)
        np.testing.assert_allclose(found(IMAGES), linear(IMAGES.transpose(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", ["first", "last"])
def test_images_are_prepared_as_numpy_does_it(channels):
    mean, std = np.float32([10, 20, 30]), np.float32([50, 60, 70])
    shape = (None, 3, 4, 4) if channels == "first" else ("n", 4, None, 3)
    prepared = (IMAGES * 255 - mean) / std
    prepared = prepared.transpose(0, 3, 1, 2) if channels == "first" else prepared
    model = from_onnx(onnx_bytes([("x", "FLOAT", shape)]), mean=mean, std=std, channels=channels, input_range=(0, 255))
    assert model.input_shape == ((4, 4, 3) if channels == "first" else (4, None, 3))
    np.testing.assert_allclose(model(IMAGES), linear(prepared), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [("FLOAT16", np.float16), ("DOUBLE", np.float64), ("UINT8", np.uint8)])
def test_the_input_has_the_dtype_of_the_model(kind, dtype):
    x = (IMAGES * 255).transpose(0, 3, 1, 2)
    x = np.rint(x) if kind == "UINT8" else x
    model = from_onnx(onnx_bytes([("x", kind, ("n", 3, 4, 4))]), input_range=(0, 255))
    np.testing.assert_allclose(model(IMAGES), linear(x.astype(dtype).astype(np.float32)), rtol=1e-3, atol=1e-2)


def test_batches_are_padded_to_a_fixed_number_of_images():
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_bytes([("x", "FLOAT", (2, 3, 4, 4))]))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"x": IMAGES.transpose(0, 3, 1, 2)})
    for count in (1, 2, 5):
        found = from_onnx(session)(IMAGES[:count])
        np.testing.assert_allclose(found, linear(IMAGES[:count].transpose(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)


def test_an_output_is_found_by_name_or_index():
    given = onnx_bytes(outputs=("scores", "twice"))
    expected = linear(IMAGES.transpose(0, 3, 1, 2))
    for output, factor in (("scores", 1), ("twice", 2), (0, 1), (1, 2)):
        np.testing.assert_allclose(from_onnx(given, output=output)(IMAGES), factor * expected, rtol=1e-4, atol=1e-5)
    named = onnx_bytes(outputs=("logits", "twice"))
    np.testing.assert_allclose(from_onnx(named)(IMAGES), expected, rtol=1e-4, atol=1e-5)
    for output in ("logits", "score", 2, True):
        with pytest.raises(ValueError, match=rf"output must be one of \['scores', 'twice'\], .* got {output!r}"):
            from_onnx(given, output=output)


def test_one_column_is_two_classes_and_probabilities_become_logarithms():
    column = from_onnx(onnx_bytes(weights=WEIGHTS[:, :1]))
    expected = linear(IMAGES.transpose(0, 3, 1, 2))[:, :1]
    assert column.num_classes == 2
    np.testing.assert_allclose(column(IMAGES), np.concatenate([0 * expected, expected], 1), rtol=1e-4, atol=1e-5)
    positive = np.abs(WEIGHTS)
    found = from_onnx(onnx_bytes(weights=positive), output="probabilities")(IMAGES)
    np.testing.assert_allclose(np.exp(found), IMAGES.transpose(0, 3, 1, 2).reshape(5, -1) @ positive, rtol=1e-4)


def test_it_has_no_gradients():
    with pytest.raises(ValueError, match="oracle='query'"):
        jax.grad(lambda x: jnp.sum(from_onnx(onnx_bytes())(x)))(jnp.asarray(IMAGES))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([INPUT, ("size", "INT64", (1,))], r"model must have one input, the images, got 2: 'images' .*'size' \[1\]"),
        ([("x", "INT32", ("n", 3, 4, 4))], r"model: its input 'x' must be one of .* got tensor\(int32\)"),
        ([("x", "FLOAT", ("n", 48))], r"model: its input 'x' must be images with 4 axes, got \['n', 48\]"),
        ([("x", "UINT8", ("n", 3, 4, 4))], r"input_range must be that of uint8 images .* got \(0.0, 1.0\)"),
    ],
)
def test_what_is_no_model_of_images_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        from_onnx(onnx_bytes(inputs))


def test_other_objects_and_shapes_are_refused():
    with pytest.raises(TypeError, match=r"model must be the path of a .onnx file, its bytes, or .* got function"):
        from_onnx(linear)
    with pytest.raises(FileNotFoundError, match=r"model: there is no file 'absent.onnx'"):
        from_onnx("absent.onnx")
    with pytest.raises(ValueError, match="channels: unknown name 'frist'"):
        from_onnx(onnx_bytes(), channels="frist")
    with pytest.raises(ValueError, match=r"images must be \[N, 4, 4, 3\] for this model, got \(2, 5, 5, 3\)"):
        from_onnx(onnx_bytes())(np.zeros((2, 5, 5, 3), np.float32))


@pytest.mark.skipif("LFT_SHARED_DIR" not in os.environ, reason="LFT_SHARED_DIR is not set")
def test_a_public_model_has_its_accuracy_and_is_attacked():
    model = from_onnx(SHARED / "models" / "mnist_zoo.onnx", input_range=(0, 255))  # takes one image at a time
    assert (model.num_classes, model.input_shape) == (10, (28, 28, 1))
    test = load_source("mnist", "test")
    right = np.argmax(model(test.images[:2000]), 1) == test.labels[:2000]
    assert abs(np.mean(right) - 0.9891) < 5e-3
    few = 2000 + np.unique(test.labels[2000:], return_index=True)[1]
    result = lft_jax.universal_perturbation(
        model, test.images[few], test.labels[few], epsilon=0.5, steps=20, oracle="query"
    )
    rate = lft_jax.attack_success_rate(model, test.images[:1000], test.labels[:1000], result.perturbation)
    print(f"mnist_zoo: {np.mean(right)}, ASR {rate}")
    assert 0.1 < rate < 0.9
