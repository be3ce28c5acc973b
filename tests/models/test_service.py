"""`from_url` against a server on this machine."""

import contextlib
import email.utils
import http.server
import io
import json
import threading
import time

import jax
import numpy as np
import pytest

import lft_jax
from lft_jax.models import from_url

IMAGES = np.random.default_rng(0).uniform(size=(5, 4, 4, 3)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(48, 3)).astype(np.float32)
FAST = {"backoff": 0.01, "timeout": 5.0}


def linear(x):
    return np.asarray(x, np.float32).reshape(len(x), -1) @ WEIGHTS


class Server:
    """Answers with the linear model.

    Attributes:
      script: functions of the handler, each of which answers one request; the model answers the others.
      seen: the images of each request.
      headers: those of each request.
      answer: logits -> body of an answer, or None for the usual one.
    """

    def __init__(self):
        self.script, self.seen, self.headers, self.answer = [], [], [], None
        self.stop = threading.Event()

    def reply(self, handler):
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        as_json = handler.headers["Content-Type"] == "application/json"
        x = np.asarray(json.loads(body)["instances"]) if as_json else np.load(io.BytesIO(body), allow_pickle=False)
        self.seen.append(x)
        self.headers.append(handler.headers)
        if self.script:
            return self.script.pop(0)(handler)
        logits = linear(x)
        if self.answer is not None:
            return send(handler, 200, self.answer(logits))
        return send(handler, 200, json.dumps({"predictions": logits.tolist()}).encode() if as_json else npy(logits))

    @property
    def images(self):
        return sum(map(len, self.seen))


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def send(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in {"Content_Length": len(body), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def status(code, body=b"no", **headers):
    return lambda handler: send(handler, code, body, **headers)


def hang_up(handler):
    handler.connection.close()
    handler.wfile = io.BytesIO()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            with contextlib.suppress(OSError):  # the client has gone
                state.reply(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        state.url = f"http://127.0.0.1:{listening.server_port}/predict"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield state
        state.stop.set()
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["json", "npy"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_logits_come_from_the_service(server, form, batch_size):
    model = from_url(server.url, format=form, batch_size=batch_size, **FAST)
    np.testing.assert_allclose(model(IMAGES), linear(IMAGES), rtol=1e-5, atol=1e-5)
    assert [len(x) for x in server.seen] == ([5] if batch_size is None else [2, 2, 1])  # the last one is not padded
    np.testing.assert_array_equal(np.concatenate(server.seen), IMAGES)
    assert model.host.values.sent == server.images == 5
    assert not model.differentiable


@pytest.mark.parametrize("form", ["json", "npy"])
def test_images_are_prepared(server, form):
    server.answer = lambda logits: npy(logits) if form == "npy" else json.dumps(logits.tolist()).encode()
    prepared = {"channels": "first", "mean": (1.0, 2.0, 3.0), "std": 2.0, "input_range": (0, 255)}
    model = from_url(server.url, format=form, **prepared, headers={"X-Token": "secret"}, **FAST)
    expected = ((IMAGES * 255 - np.asarray([1, 2, 3])) / 2).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(model(IMAGES), linear(expected), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(server.seen[0], expected, rtol=1e-5, atol=1e-5)
    assert server.headers[0]["X-Token"] == "secret" and "secret" not in repr(model)


@pytest.mark.parametrize(
    ("shape", "output"),
    [
        (lambda rows: rows, "logits"),
        (lambda rows: {"logits": rows}, "logits"),
        (lambda rows: {"predictions": rows, "version": 1}, "logits"),
        (lambda rows: {"scores": rows, "predictions": [0] * 5}, "scores"),
        (lambda rows: {"predictions": [{"scores": row, "class": 0} for row in rows]}, "scores"),
        (lambda rows: {"predictions": [[0], rows]}, 1),
        (lambda rows: {"deep": {"er": rows}}, lambda answer: answer["deep"]["er"]),
    ],
)
def test_scores_are_found_in_the_answer(server, shape, output):
    server.answer = lambda logits: json.dumps(shape(logits.tolist())).encode()
    np.testing.assert_allclose(
        from_url(server.url, output=output, **FAST)(IMAGES), linear(IMAGES), rtol=1e-5, atol=1e-5
    )


def test_probabilities_and_one_column(server):
    server.answer = lambda logits: json.dumps(np.asarray(jax.nn.softmax(logits)).tolist()).encode()
    found = from_url(server.url, output="probabilities", **FAST)(IMAGES)
    np.testing.assert_allclose(jax.nn.softmax(found), jax.nn.softmax(linear(IMAGES)), rtol=1e-4)
    server.answer = lambda logits: json.dumps({"predictions": logits[:, 0].tolist()}).encode()
    found = from_url(server.url, **FAST)(IMAGES)
    np.testing.assert_allclose(found, np.stack([np.zeros(5), linear(IMAGES)[:, 0]], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("failure", [status(500), status(503), status(429), hang_up])
def test_failures_are_tried_again(server, failure):
    server.script = [failure, failure]
    model = from_url(server.url, retries=2, **FAST)
    np.testing.assert_allclose(model(IMAGES), linear(IMAGES), rtol=1e-5, atol=1e-5)
    assert len(server.seen) == 3 and model.host.values.sent == server.images == 15


def test_a_service_that_always_fails(server):
    server.script = [status(503, b"out of memory")] * 9
    model = from_url(server.url + "?token=secret", retries=2, **FAST)
    with pytest.raises(ConnectionError, match=r"did not answer in 3 attempts.*HTTP 503.*out of memory") as error:
        model(IMAGES)
    assert server.url in str(error.value) and "secret" not in str(error.value)
    assert model.host.values.sent == server.images == 15


def test_a_service_that_stalls(server):
    server.script = [lambda handler: server.stop.wait(5)] * 2
    model = from_url(server.url, retries=1, backoff=0.01, timeout=0.3)
    with pytest.raises(ConnectionError, match=r"in 2 attempts.*timed out.*raise timeout=0.3"):
        model(IMAGES)
    assert model.host.values.sent == server.images == 10


def test_an_answer_that_stalls_or_ends_early(server):
    def begin(handler):
        send(handler, 200, b"[[", Content_Length=100)
        server.stop.wait(5)

    server.script = [begin, lambda handler: send(handler, 200, b"[[", Content_Length=100)]
    model = from_url(server.url, retries=2, backoff=0.01, timeout=0.5)
    np.testing.assert_allclose(model(IMAGES), linear(IMAGES), rtol=1e-5, atol=1e-5)
    assert model.host.values.sent == server.images == 15


def test_nobody_listens(server):
    model = from_url("http://127.0.0.1:1/predict", retries=1, **FAST)
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1/predict did not answer in 2 attempts.*refused"):
        model(IMAGES)
    assert model.host.values.sent == 10


@pytest.mark.parametrize("code", [302, 400, 401, 404])
def test_refusals_are_not_tried_again(server, code):
    server.script = [status(code, b"expects 8 x 8 images" + b"." * 500, Location="/elsewhere")]
    with pytest.raises(
        ConnectionError, match=rf"predict answered HTTP {code} .*expects 8 x 8 images\.+'\.\.\."
    ) as error:
        from_url(server.url, **FAST)(IMAGES)
    assert len(server.seen) == 1 and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        (100, 60, 100),  # as a date, so many seconds from now
        (-100, 0.01, 0.01),
        ("soon", 0.01, 0.01),
        ("-3", 0.01, 0.01),
        ("²", 0.01, 0.01),
    ],
)
def test_retry_after_is_obeyed(server, value, least, most):
    if isinstance(value, int):
        value = email.utils.formatdate(time.time() + value, usegmt=True)
    server.script, pauses = [status(429, Retry_After=value)], []
    model = from_url(server.url, **FAST)
    model.host.values.sleep = pauses.append
    model(IMAGES)
    assert len(pauses) == 1 and least <= pauses[0] <= most


def test_a_pause_beyond_an_hour_is_a_failure(server):
    server.script = [status(429, Retry_After=10**9)]
    model = from_url(server.url, **FAST)
    model.host.values.sleep = lambda seconds: pytest.fail("waits")
    with pytest.raises(ConnectionError, match=r"in 1 attempts.*HTTP 429.*asks for a pause of 1000000000 s"):
        model(IMAGES)


def test_the_pauses_double(server):
    server.script, pauses = [status(500)] * 4, []
    model = from_url(server.url, retries=4, backoff=0.5)
    model.host.values.sleep = pauses.append
    model(IMAGES)
    assert pauses == [0.5, 1.0, 2.0, 4.0]


def test_the_rate_is_limited_by_waiting(server):
    model, now, pauses = from_url(server.url, batch_size=1, rate_limit=4, **FAST), [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    model.host.values.clock, model.host.values.sleep = lambda: now[0], sleep
    model(IMAGES)
    assert pauses == [0.25] * 4  # not before the first request
    now[0] += 100
    model(IMAGES[:1])
    assert len(pauses) == 4
    server.script = [status(500)]
    model(IMAGES[:1])
    assert pauses[4:] == pytest.approx([0.25, 0.01, 0.24])  # repetitions keep to the rate, too


def test_the_rate_in_real_time(server):
    began = time.monotonic()
    from_url(server.url, batch_size=1, rate_limit=50, **FAST)(IMAGES)
    assert time.monotonic() - began >= 0.08  # four intervals of 0.02


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>Welcome</html>",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"null",
        b"3",
        b'"text"',
        b'{"error": "no model"}',
        b'{"predictions": null}',
        b'{"predictions": [[1, 2], [1, 2, 3], [1], [2], [3]]}',
        b'{"predictions": [[1, 2], [1, 2], [1, 2], [1, 2]]}',
        b'{"predictions": [[], [], [], [], []]}',
        b"[[1, 2], [1, 2], [1, 2], [1, 2], [1, null]]",
        b"[[1, 2], [1, 2], [1, 2], [1, 2], [1, NaN]]",
        b"[[1, 2], [1, 2], [1, 2], [1, 2], [1, Infinity]]",
        b"[[1, 2], [1, 2], [1, 2], [1, 2], [1, 1e300]]",
        b'[["1", "2"], ["1", "2"], ["1", "2"], ["1", "2"], ["1", "2"]]',
        b"[[true, false], [true, false], [true, false], [true, false], [true, false]]",
        b"[3, 1, 4, 1, 5]",  # classes
        b"[[[1]], [[1]], [[1]], [[1]], [[1]]]",
        b'[{"class": 1}, {"class": 1}, {"class": 1}, {"class": 1}, {"class": 1}]',
    ],
)
def test_garbage_is_shown(server, answer):
    server.answer = lambda logits: answer
    with pytest.raises(ValueError, match=r"finite scores \[5, classes\] in the format 'json', got") as error:
        from_url(server.url, **FAST)(IMAGES)
    message = str(error.value)
    assert server.url in message and repr(answer[:20].decode("utf-8", "replace"))[:-1] in message
    assert len(server.seen) == 1 and len(message) < 1000


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x93NUMPY\x01",
        b"\x93NUMPY\x01\x00\x76\x00nonsense",
        b"PK\x03\x04zip",
        npy(np.zeros((5, 3), np.float32))[:-4],
        npy(np.zeros((4, 3), np.float32)),
        npy(np.full((5, 3), np.nan, np.float32)),
        npy(np.array([[None] * 3] * 5, object), allow_pickle=True),  # a pickle, which must never be loaded
        b"[[1, 2], [1, 2], [1, 2], [1, 2], [1, 2]]",
    ],
)
def test_garbage_as_npy(server, answer):
    server.answer = lambda logits: answer
    with pytest.raises(ValueError, match=r"finite scores \[5, classes\] in the format 'npy', got"):
        from_url(server.url, format="npy", **FAST)(IMAGES)


def test_the_number_of_classes_may_not_change(server):
    model = from_url(server.url, **FAST)
    model(IMAGES)
    server.answer = lambda logits: json.dumps(logits[:, :2].tolist()).encode()
    with pytest.raises(ValueError, match=r"as many classes as before, \(3,\), got \(2,\)"):
        model(IMAGES)


def test_max_queries_is_never_exceeded(server):
    model = from_url(server.url, batch_size=2, max_queries=12, retries=5, **FAST)
    model(IMAGES)
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"max_queries=12: 10 images were sent to http.*, 5 more would exceed it"):
        model(IMAGES)  # nothing of it is sent
    assert model.host.values.sent == server.images == 10
    server.script = [status(503)] * 9
    with pytest.raises(RuntimeError, match=r"12 images were sent to .*, 2 more would exceed it"):
        model(IMAGES[:2])
    assert model.host.values.sent == server.images == 12
    with pytest.raises(RuntimeError, match="max_queries=12"):
        model(IMAGES[:1])
    assert server.images == 12


def test_an_attack_by_queries_is_that_on_the_function(server):
    labels = linear(IMAGES).argmax(1)
    options = {"epsilon": 0.1, "steps": 2, "oracle": "query", "max_queries": 400}
    server.script = [status(503)]
    model = from_url(server.url, batch_size=64, max_queries=405, **FAST)
    found = lft_jax.universal_perturbation(model, IMAGES, labels, **options)
    expected = lft_jax.universal_perturbation(linear, IMAGES, labels, **options)
    np.testing.assert_allclose(found.perturbation, expected.perturbation, atol=1e-5)
    assert found.history["queries"].tolist() == expected.history["queries"].tolist()
    assert model.host.values.sent == server.images == found.history["queries"][-1] + 5  # one failure of five images


def test_gradients_are_refused(server):
    with pytest.raises(ValueError, match="model has no gradients; pass oracle='query'"):
        jax.grad(lambda x: from_url(server.url, **FAST)(x).sum())(IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://host/file"}, "url must be an address such as .*, got 'ftp://host/file'"),
        ({"url": "file:///etc/hosts"}, "url must be an address"),
        ({"url": "host/path"}, "url must be an address"),
        ({"url": "http:///path"}, "url must be an address"),
        ({"url": "http://host/a b"}, "url must be an address"),
        ({"format": "jsn"}, "format: unknown name 'jsn'. Did you mean 'json'"),
        ({"format": "npy", "output": "scores"}, "output must be 'logits', 'probabilities' or a function"),
        ({"timeout": 0}, "timeout must be a finite number above 0, got 0"),
        ({"rate_limit": 0.0}, "rate_limit must be a finite number above 0, got 0.0"),
        ({"backoff": -1.0}, "backoff must be a finite number of seconds, at least 0, got -1.0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"retries": 1.5}, "retries must be an integer, at least 0, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_queries": 0}, "max_queries must be at least 1, got 0"),
        ({"headers": {"X": 1}}, r"headers must be strings by name, got values for \['X'\]"),
        ({"std": 0.0}, "std must be a finite number above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        from_url(**{"url": "http://host/path", **options})


def test_no_image_is_sent_to_fill_up_a_batch(server):
    model = from_url(server.url, **FAST)
    labels = linear(IMAGES).argmax(1)
    lft_jax.attack_success_rate(model, IMAGES, labels, np.zeros(IMAGES.shape[1:]), batch_size=2)
    assert server.images == 2 * 5
    result = lft_jax.universal_perturbation(model, IMAGES, labels, epsilon=0.1, steps=1, batch_size=2)
    assert server.images - 2 * 5 == result.queries == result.history["queries"][-1]
