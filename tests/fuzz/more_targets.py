"""Targets of `tests.fuzz.targets` that are not files of arrays or pictures: rules, victims, runs, answers, flags."""

import contextlib
import functools
import json
import re
import socket
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
from absl import flags

from lft_jax import UniversalPerturbation, load_pretrained
from lft_jax.auditing._plan import Cell
from lft_jax.auditing._store import Run, Store, digest
from lft_jax.cli import attack, audit, config
from lft_jax.cli._own import check_own, radius
from lft_jax.meta import checkpoints, run
from lft_jax.meta.trainer import MetaState, MetaTrainer
from lft_jax.models import from_url
from lft_jax.optimizers.rules import coordinate_lstm, rule_from_dict, rule_to_dict, spatial_lstm, spectral_lstm
from lft_jax.pretrained import pretrained_card, save_rule
from lft_jax.tasks import Constraint
from lft_jax.victims import Victim, load_victim, save_victim
from lft_jax.victims.models import build_model
from tests.fuzz import mutations
from tests.fuzz.targets import THETA, npz, target, whole


@functools.cache
def rules():
    """Rules with their descriptions and the bytes of their weights."""
    found = []
    for rule in (coordinate_lstm(2, 1), spatial_lstm(2, maps=(2,)), spectral_lstm(hidden=2)):
        with tempfile.TemporaryDirectory() as folder:
            save_rule(f"{folder}/a.safetensors", rule.init(jax.random.key(0)), rule, {"seeds": [0]})
            card = json.loads(Path(folder, "a.json").read_text())
            found.append((rule, card, Path(folder, "a.safetensors").read_bytes()))
    return found


def write_rule(folder, card, weights):
    (folder / "a.json").write_bytes(card)
    (folder / "a.safetensors").write_bytes(weights)
    return str(folder / "a.safetensors")


def header_changed(random, weights):
    """The bytes of a safetensors file, whose JSON header is changed or damaged."""
    length = int.from_bytes(weights[:8], "little")
    if random.random() < 0.4:
        return mutations.damaged(random, weights)
    numbers = bytearray(weights[8 + length :])
    if random.random() < 0.2 and len(numbers) >= 4:
        numbers[:4] = random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f"))  # NaN, infinity
    header = json.loads(weights[8 : 8 + length])
    if random.random() < 0.5:
        name = random.choice([name for name in header if name != "__metadata__"])
        header[name]["dtype"] = random.choice(
            ("F64", "I32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "C64", "BOOL", "F4", "X")
        )
        text = json.dumps(header).encode()
    else:
        text = mutations.json_text(random, header)
    length = random.choice((len(text),) * 6 + (2**63, 2**40, 99_000_000, 0))
    return length.to_bytes(8, "little") + text + bytes(numbers)


@target(900, r"^name: .*a\.safetensors")
def rule_weights(random, folder):
    _, card, weights = random.choice(rules())
    weights = weights if whole(random) else header_changed(random, weights)
    params, _ = load_pretrained(write_rule(folder, json.dumps(card).encode(), weights))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@target(700, r"^name: .*a\.(safetensors|json)")
def rule_card(random, folder):
    _, card, weights = random.choice(rules())
    text = json.dumps(card).encode() if whole(random) else mutations.json_text(random, card)
    name = write_rule(folder, text, weights)
    assert isinstance(pretrained_card(name), dict)
    load_pretrained(name)


@target(700, r".")
def rule_description(random, folder):
    description = json.loads(json.dumps(rule_to_dict(random.choice(rules())[0])))
    rule = rule_from_dict(description if whole(random) else mutations.changed(random, description))
    assert json.dumps(rule_to_dict(rule))


@functools.cache
def victim_files():
    with tempfile.TemporaryDirectory() as folder:
        model = build_model("small_cnn", num_classes=2)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))
        variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        card = {"architecture": "small_cnn", "num_classes": 2, "image_shape": [8, 8, 1], "source": "digits"}
        save_victim(f"{folder}/v", Victim(variables, card))
        return card, Path(folder, "v", "variables.safetensors").read_bytes()


@target(250, r"^path: .*victim")
def victim(random, folder):
    card, weights = victim_files()
    (folder / "victim").mkdir()
    undamaged, of_card = whole(random), random.random() < 0.6
    text = json.dumps(card).encode() if undamaged or not of_card else mutations.json_text(random, card)
    (folder / "victim" / "card.json").write_bytes(text)
    weights = weights if undamaged or of_card else header_changed(random, weights)
    (folder / "victim" / "variables.safetensors").write_bytes(weights)
    load_victim(folder / "victim")


@functools.cache
def result_arrays():
    history = {"loss": np.ones(2), "asr": np.zeros(2)}
    return UniversalPerturbation(THETA, history, Constraint("linf", 0.25), steps=2)._stored()


@target(800, r"^path: .*result\.npz")
def result_npz(random, folder):
    arrays = {name: np.asarray(value) for name, value in result_arrays().items()}
    if random.random() < 0.2:
        arrays[random.choice(("unknown", "penalty", "norm", "steps"))] = random.choice(
            (THETA, np.array("x"), np.array(-1))
        )
    (folder / "result.npz").write_bytes(npz(random, arrays))
    assert UniversalPerturbation.load(folder / "result.npz").perturbation.dtype.kind == "f"


@functools.cache
def service():
    """A server that answers with the bytes that it is given, and closes the connection."""
    server = socket.create_server(("127.0.0.1", 0))
    answers = []

    def serve():
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                received = b""
                while b"\r\n\r\n" not in received:
                    received += connection.recv(65536)
                length = int(re.search(rb"(?i)content-length: (\d+)", received)[1])
                while len(received.partition(b"\r\n\r\n")[2]) < length:
                    received += connection.recv(65536)
                connection.sendall(answers[-1])
                connection.shutdown(socket.SHUT_WR)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/predict", answers


@target(1200, r"127\.0\.0\.1", ValueError, ConnectionError)
def service_answer(random, folder):
    url, answers = service()
    scores = np.array([[0.25, -1.5, 2.0], [1.0, 0.0, 0.5]], np.float32)
    form = random.choice(("json", "json", "npy"))
    body = mutations.npy(scores) if form == "npy" else json.dumps({"predictions": scores.tolist()}).encode()
    status, headers, undamaged = "200 OK", {"Content-Length": len(body)}, whole(random)
    if not undamaged:
        if random.random() < 0.6:
            values = {"predictions": random.choice((scores.tolist(), [{"logits": row} for row in scores.tolist()]))}
            body = mutations.npy_file(random, scores) if form == "npy" else mutations.json_text(random, values)
        if random.random() < 0.05:
            body = json.dumps({"predictions": ["1" * 300_000] + ["1"] * 20_000}).encode()
        headers["Content-Length"] = random.choice((len(body),) * 8 + (0, 2**40, -1, "x", "9" * 5000))
        status = random.choice(
            ("200 OK",) * 12 + ("302 Found", "308 X", "429 Busy", "503 No", "404 <b>", "999 X", "x", "100 Continue")
        )
        headers["Location"] = random.choice(("http://[", "file:///etc/passwd", "/", "http://127.0.0.1:1/"))
        headers["Retry-After"] = random.choice(
            ("0", "-1", "x", "\u00b2", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "1e9")
        )
        if random.random() < 0.1:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            body = (
                random.choice((b"%x\r\n" % len(body), b"ffffffffff\r\n", b"-1\r\n", b"x\r\n")) + body + b"\r\n0\r\n\r\n"
            )
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    answer = head.encode("latin1", "replace") + body
    answers[:] = [mutations.damaged(random, answer) if not undamaged and random.random() < 0.2 else answer]
    output = random.choice(("logits", "probabilities", 0)) if form == "json" and not undamaged else "logits"
    model = from_url(url, format=form, output=output, retries=random.randrange(2), backoff=0, timeout=1)
    model.host.values.sleep = lambda seconds: None
    found = model.host.values(np.zeros((2, 4, 4, 3), np.float32))
    assert found.dtype == np.float32 and len(found) == 2 and np.isfinite(found).all()


CELL = Cell("momentum", 0.1, 5, 20, 0)


@target(600, "^$")
def audit_run(random, folder):
    """A damaged run of an audit is none."""
    clean = np.arange(12, dtype=np.float32).reshape(3, 4)
    store = Store(folder, digest(np.arange(3)), clean)
    history = {"loss": [1.0, 0.5], "asr": [0.0, 0.2], "queries": [10, 20]}
    store.save(Run(CELL, THETA, np.arange(3), np.linspace(0.5, 1, 3), history, 40, 1.5, 2.5, True, "cpu", ()))
    path = store.path(CELL)
    kind = random.randrange(3)
    if kind == 0:
        found = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_bytes(mutations.json_text(random, found))
    else:
        damaged = path if kind == 1 else next(folder.glob("answers-*.npy"))
        content = random.choice(
            (mutations.npy_file(random, THETA), mutations.archive(random, {"a.npy": mutations.npy(THETA)}))
        )
        damaged.write_bytes(content)
    Store(folder, digest(np.arange(3)), clean).load(CELL)


TREE = {"a": np.ones((3, 2), np.float32), "b": [np.zeros(4, np.int32)]}


@functools.cache
def checkpoint_files(kind):
    """`{name: content}` of a checkpoint, or of a run of three meta-steps."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "x")
        if kind == "tree":
            checkpoints.save_tree(root, TREE)
        else:
            finished(root)
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and "tfevents" not in path.name
        }


def unpacked(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


STATE = MetaState({"x": np.ones(2, np.float32)}, {"m": np.ones(2, np.float32)}, None, np.int32(0))


def finished(workdir):
    state = STATE._replace(key=jax.random.key(0))
    metrics = {"loss": 0.5, "skipped": 0, "skipped_in_a_row": 0}
    trainer = MetaTrainer(lambda key: state, lambda s: (s._replace(step=s.step + 1), metrics))
    options = {"config": {"seed": 0, "rule": {"hidden": 2}}, "progress": False, "num_meta_steps": 3}
    return run.train(trainer, jax.random.key(0), workdir, **options)


@target(150, r"^path: ")
def checkpoint(random, folder):
    files = dict(checkpoint_files("tree"))
    name = random.choice(list(files))
    if not whole(random):
        files.pop("sha256.json") if random.random() < 0.7 else None
        if name in files:
            is_json = files[name][:1] == b"{" and random.random() < 0.7
            change = mutations.json_text if is_json else mutations.damaged
            files[name] = change(random, json.loads(files[name]) if is_json else files[name])
    unpacked(folder / "tree", files)
    found = checkpoints.load_tree(folder / "tree", TREE)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, TREE)


@target(150, r"^workdir: ")
def meta_run(random, folder):
    files = dict(checkpoint_files("run"))
    name = random.choice(("config.json", "metrics.jsonl", "run.lock", "checkpoints"))
    if whole(random):
        pass
    elif name == "checkpoints":
        (folder / "run" / "checkpoints" / random.choice(("\u00b2", "99", "x", "9" * 200, "\u0663"))).mkdir(parents=True)
    elif name == "metrics.jsonl":
        lines = files[name].splitlines()
        lines[random.randrange(3)] = mutations.json_text(random, json.loads(lines[0]))
        files[name] = b"\n".join(lines) + random.choice((b"", b"\n"))
    else:
        value = (
            json.loads(files["config.json"]) if name == "config.json" else {"host": "x", "process": 1, "started": ""}
        )
        files[name] = mutations.json_text(random, value)
    unpacked(folder / "run", files)
    assert int(finished(folder / "run").step) == 3


@target(1500, r".", ValueError, TypeError, flags.Error)
def command_line(random, folder):
    """Flag strings of `lft-attack` and `lft-audit`; nothing is run."""
    program = random.choice((attack, audit))
    values = flags.FlagValues()
    config.define_flags(program.Config, values)
    names = [name for name in program.Config.__dataclass_fields__]
    texts = (
        *mutations.TEXTS,
        "8/255",
        "1/0",
        "1e999999999",
        "-0",
        "1_0",
        "1,2,,3",
        "0x10",
        "9" * 5000,
        "nan",
        "true",
        "\u0663",
    )
    given = ["program", "--model=no.module:f", "--output=o", "--data=d", "--out=o"][: 3 if program is attack else None]
    given = [text for text in given if program is attack or not text.startswith("--output")]
    chosen = [f"--{random.choice(names)}={random.choice(texts)}" for _ in range(random.randrange(4))]
    arguments = given + [
        mutations.damaged(random, text.encode()).decode("latin1") if whole(random) else text for text in chosen
    ]
    config.check_names(arguments[1:])
    values(arguments)
    found = config.read_flags(program.Config, values)
    check_own(found)
    for text in found.epsilons if program is audit else [found.epsilon or "8/255"]:
        assert 0 < radius("--epsilon", text) < np.inf
    config.pairs("--epsilon", [f"digits={random.choice(texts)}"] if random.random() < 0.2 else ["digits=0.2"])
