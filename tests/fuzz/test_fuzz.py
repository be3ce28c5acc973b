"""A short form of `make fuzz`; pickles and false claims of size, tried in each place; the page of an audit."""

import ast
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lft_jax import UniversalPerturbation
from lft_jax._reading import EXPANDED, parse_json, parse_npy, read_npy, read_npz
from lft_jax.cli._images import load_images
from lft_jax.data import load_source
from lft_jax.interop import load_perturbation
from tests.fuzz import harness, mutations
from tests.fuzz.targets import Target

PACKAGE = Path(__file__).parents[2] / "lft_jax"
#: Modules and functions that can run what is in a file.
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "eval", "exec", "os.system"}
FORBIDDEN |= {"yaml.load", "yaml.unsafe_load", "numpy.load", "np.load", "__import__", "compile", "subprocess.Popen"}


def called(node):
    """The dotted name of what is imported or called."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {ast.unparse(node.func)} if isinstance(node, ast.Call) else set()


def keywords(node):
    return {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}


def offences(text):
    found = []
    for node in ast.walk(ast.parse(text)):
        names = called(node)
        found += sorted(names & FORBIDDEN)
        if isinstance(node, ast.Call):
            given = keywords(node)
            if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
            if names == {"torch.load"} and given.get("weights_only") != "True":
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_in_the_package_can_run_what_a_file_says(path):
    assert not offences(path.read_text(encoding="utf-8"))


def test_what_can_run_a_file_is_found():
    lines = ["import pickle", "from joblib import load", "eval(x)", "subprocess.run(x, shell=True)", "yaml.load(x)"]
    lines += ["np.load(x)", "numpy.lib.format.read_array(f, allow_pickle=True)", "torch.load(x)", "exec(x)"]
    assert all(offences(line) for line in lines)
    assert not offences(
        "torch.load(x, weights_only=True)\nmodel.eval()\nre.compile('x')\nsubprocess.run(x, shell=False)"
    )


def objects():
    """An array that has to be unpickled."""
    file = io.BytesIO()
    np.save(file, np.array([[[mutations.Trap()]]], object), allow_pickle=True)
    return file.getvalue()


PLACES = {
    "uap.npy": load_perturbation,
    "uap.png": load_perturbation,
    "mine.npz": lambda path: load_images(str(path)),
    "its.npz": lambda path: load_source(path, "train"),
    "result.npz": UniversalPerturbation.load,
}


@pytest.mark.parametrize("kind", ["pickle", "objects", "archive"])
@pytest.mark.parametrize("name", PLACES)
def test_a_pickle_is_refused_in_each_place(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("images", "labels", "perturbation", "norm")
    entries = {f"{each}.npy": objects() for each in names}
    content = {"pickle": mutations.trap(), "objects": objects(), "archive": mutations.stored(entries)}[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        PLACES[name](tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name], "it was unpickled"


@pytest.mark.frameworks
def test_a_pickle_is_refused_as_a_tensor(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save(mutations.Trap(), tmp_path / "uap.pt")
    with pytest.raises(ValueError, match=r"uap\.pt is no \.pt file of a tensor alone"):
        load_perturbation(tmp_path / "uap.pt")
    torch.save(torch.zeros(1).expand(10**5, 10**5, 3), tmp_path / "uap.pt")  # one number, which is repeated
    with pytest.raises(ValueError, match=r"must hold all elements of its tensor \(100000, 100000, 3\)"):
        load_perturbation(tmp_path / "uap.pt")
    assert not (tmp_path / mutations.Trap.path).exists()


def claiming(shape, dtype="<f4", data=bytes(64)):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (claiming((10**6, 10**6, 3)), "claims 12000000000000 bytes"),
        (claiming((17,)), "claims 68 bytes, shape \\(17,\\), of which 64 are there"),
        (claiming((-4, -4)), r"claims the shape \(-4, -4\)"),
        (claiming((16,), "|O"), "holds '|O', expected numbers or strings"),
        (claiming((1,), "<U99999999"), "claims 399999996 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(9), "its header claims 4294967295 bytes"),
        (b"", "does not begin as an array"),
    ],
)
def test_claims_of_a_header_are_checked_before_memory_is_taken(content, said, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    (tmp_path / "a.npz").write_bytes(mutations.stored({"a.npy": content}))
    for reader, name in ((read_npy, "a.npy"), (read_npz, "a.npz")):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=said):
                reader(tmp_path / name)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_a_bomb_is_not_opened(tmp_path):
    piece = bytes(2**24)
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made,
        made.open("a.npy", "w") as file,
    ):
        file.write(claiming((EXPANDED // 4 + 2**22,), data=b""))
        for _ in range(EXPANDED // 2**24 + 1):
            file.write(piece)
    with pytest.raises(ValueError, match="bytes expand to 28"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "|u1", ">i8", "<U3", "|b1", "<f2", "<c8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_arrays_are_read_as_numpy_reads_them(dtype, shape, tmp_path):
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2).astype(dtype)
    for made in (array, np.asfortranarray(array)):
        np.save(tmp_path / "a.npy", made)
        np.savez_compressed(tmp_path / "a.npz", x=made, y=made)
        for found in (read_npy(tmp_path / "a.npy"), *read_npz(tmp_path / "a.npz").values()):
            np.testing.assert_array_equal(found, np.load(tmp_path / "a.npy"), strict=dtype[0] != ">")
            assert found.dtype.isnative and found.flags.writeable
        content = (tmp_path / "a.npy").read_bytes()
        np.testing.assert_array_equal(parse_npy(io.BytesIO(content), len(content)), made)


def test_json_that_is_too_deep_is_a_value_error():
    with pytest.raises(ValueError, match="too deeply nested"):
        parse_json("[" * 200_000)


def test_files_out_of_a_folder_are_not_read(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(mutations.png(2, 2, rows=bytes(14)))
    (inside / "a.png").write_bytes(mutations.png(2, 2, rows=bytes(14)))
    assert load_images(str(inside))[0].count == 1
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        (inside / "link.png").unlink(missing_ok=True)
        (inside / "link.png").symlink_to(tmp_path / "secret.png")
        (inside / "labels.csv").write_text(f"file,label\n{name},0\n")
        with pytest.raises(ValueError, match="a file out of the folder"):
            load_images(str(inside))
    (inside / "labels.csv").unlink()
    with pytest.raises(ValueError, match=r"link\.png is, or leads to, a file out of the folder"):
        load_images(str(inside))
    (inside / "link.png").unlink()
    (inside / "a.png").write_bytes(mutations.png(1, 60_000))  # 224 x 13 million, scaled
    with pytest.raises(ValueError, match="224x13440000 pixels, more than"):
        load_images(str(inside), size=224)


#: Inputs of the short form, which takes seconds; the rest of a target's inputs is left to `make fuzz`.
SHORT = 25
SLOW = {"victim": 4, "checkpoint": 3, "meta_run": 2}


@pytest.mark.parametrize("name", sorted(set(harness.TARGETS) - {"perturbation_pt"}))
def test_damaged_inputs_are_refused_as_documented(name):
    for number in range(SLOW.get(name, SHORT)):
        outcome, said = harness.one(name, number, limit=False)
        assert outcome in harness.FINE, f"{name} {number}: {outcome}: {said}"


def test_faults_are_seen(monkeypatch):
    def reads(random, folder):
        fault = random.randrange(4)
        if fault == 0:
            (folder.parent / "beside").touch()
        elif fault == 1:
            raise KeyError("x")
        elif fault == 2:
            raise ValueError("of something")
        else:
            raise MemoryError

    monkeypatch.setitem(harness.TARGETS, "bad", Target(reads, 1, "^path: "))
    found = {harness.one("bad", number, limit=False)[0] for number in range(20)}
    assert found == {"escape", "undocumented", "memory"}
    forever = Target(lambda random, folder: [None for _ in iter(int, 1)], 1, "")
    monkeypatch.setitem(harness.TARGETS, "bad", forever)
    monkeypatch.setattr(harness, "SECONDS", 0.01)
    assert harness.one("bad", 0, limit=False)[0] == "hang"


def test_the_counts_are_of_a_whole_run():
    results = json.loads((PACKAGE.parent / "results" / "fuzz.json").read_text(encoding="utf-8"))
    assert results["inputs"] >= 10_000 and set(results["targets"]) >= set(harness.TARGETS) - {"bad"}
    assert not results["findings"]
