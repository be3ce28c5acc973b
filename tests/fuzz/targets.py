"""What is fuzzed: each target writes one damaged input and has the package read it.

A target is a function of `(random, folder)`, a `random.Random` and an empty folder for its files. It returns nothing if
the input was accepted, and asserts that what was read is what was promised. `TARGETS` has the exceptions that are
documented, and what their messages must name. Those of `tests.fuzz.more_targets` are added when it is imported.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lft_jax.cli._images import load_images
from lft_jax.data import load_source
from lft_jax.data._cache import cached
from lft_jax.interop import load_perturbation, save_perturbation
from tests.fuzz import mutations

THETA = np.linspace(-0.25, 0.25, 48, dtype=np.float32).reshape(4, 4, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3)).astype(np.uint8)
LABELS = np.arange(20) % 2
#: Share of the inputs without damage, which have to be accepted.
WHOLE = 0.02


@dataclasses.dataclass(frozen=True)
class Target:
    """What reads the inputs.

    Attributes:
      run: see above.
      inputs: number of inputs in a whole run.
      says: what the message of a documented exception must match: the argument or the file.
      documented: these exceptions.
    """

    run: Callable
    inputs: int
    says: str
    documented: tuple[type[BaseException], ...] = (ValueError,)


TARGETS: dict[str, Target] = {}


def target(inputs, says, *documented):
    def add(function):
        TARGETS[function.__name__] = Target(function, inputs, says, documented or (ValueError,))
        return function

    return add


def whole(random):
    return random.random() < WHOLE


@functools.cache
def content_of(suffix):
    """The bytes of a perturbation as a file."""
    file = Path(f"seed{suffix}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_perturbation(folder / file, THETA)
        return (folder / file).read_bytes()


def check_perturbation(path):
    found = load_perturbation(path)
    assert found.ndim == 3 and np.isfinite(found).all() and found.dtype.isnative


@target(1500, r"^path: .*uap\.npy")
def perturbation_npy(random, folder):
    whole_file = whole(random)
    content = content_of(".npy") if whole_file else mutations.npy_file(random, THETA)
    (folder / "uap.npy").write_bytes(content)
    check_perturbation(folder / "uap.npy")


@target(800, r"^path: .*uap\.png")
def perturbation_png(random, folder):
    text = [("lft_jax:radius", "0.25")]
    seed = content_of(".png")
    (folder / "uap.png").write_bytes(seed if whole(random) else mutations.picture(random, [seed], text))
    check_perturbation(folder / "uap.png")


def perturbation_pt(random, folder):
    import torch

    kind = random.randrange(4)
    path = folder / "uap.pt"
    if kind == 0:
        view = torch.zeros(1).expand(10 ** random.randrange(1, 6), 10 ** random.randrange(1, 6), 3)
        other = random.choice((view, torch.zeros(3, 4, 4).to_sparse(), torch.zeros(3, 4, 4, dtype=torch.bfloat16)))
        other = random.choice(
            (other, torch.empty(3, 4, 4, device="meta"), {"a": torch.zeros(3)}, torch.nan * view[:2, :2])
        )
        torch.save(other, path, _use_new_zipfile_serialization=random.random() < 0.8)
    elif kind == 1:
        path.write_bytes(mutations.archive(random, {"uap/data.pkl": mutations.trap(), "uap/version": b"3\n"}))
    else:
        path.write_bytes(content_of(".pt") if whole(random) else mutations.damaged(random, content_of(".pt")))
    check_perturbation(path)


if importlib.util.find_spec("torch"):
    target(300, r"^path: .*uap\.pt")(perturbation_pt)


def npz(random, arrays):
    entries = {f"{name}.npy": mutations.npy(array) for name, array in arrays.items()}
    if whole(random):
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()
    name = random.choice(list(arrays))
    entries[f"{name}.npy"] = random.choice((mutations.npy_file(random, arrays[name]), entries[f"{name}.npy"]))
    return mutations.archive(random, entries) if random.random() < 0.7 else mutations.stored(entries)


@target(1500, r"^--images: .*mine\.npz")
def images_npz(random, folder):
    names = np.array(["cat", "<b>dog</b>"])
    arrays = {"images": IMAGES, "labels": LABELS, "class_names": names}
    arrays |= {"test_images": IMAGES[:2] / np.float32(255)} if random.random() < 0.3 else {}
    (folder / "mine.npz").write_bytes(npz(random, arrays))
    for found in load_images(str(folder / "mine.npz")):
        if found is not None:
            images, labels = found.part(np.arange(found.count))
            assert images.dtype in (np.uint8, np.float32) and images.ndim == 4 and images.dtype.isnative
            assert labels is None or (labels.dtype == np.int32 and labels.min() >= 0 and labels.max() < 10**6)


@target(900, r"^name: .*mine")
def source_npz(random, folder):
    (folder / "mine.npz").write_bytes(npz(random, {"images": IMAGES, "labels": LABELS}))
    found = load_source(folder / "mine.npz", random.choice(("train", "validation", "test")))
    assert found.images.dtype == np.uint8 and found.images.ndim == 4 and found.labels.dtype == np.int32


@target(400, "^$")
def cache(random, folder):
    (folder / "key.npz").write_bytes(npz(random, {"images": IMAGES, "labels": LABELS}))
    images, labels = cached("key", lambda: (IMAGES, LABELS), folder)
    assert images.ndim in (3, 4) and len(images) == len(labels)


@functools.cache
def pictures():
    made = []
    for kind in ("PNG", "JPEG", "BMP"):
        file = io.BytesIO()
        Image.fromarray(IMAGES[0].repeat(2, 0).repeat(2, 1)).save(file, kind)
        made.append(file.getvalue())
    return made


@target(700, r"^(--images|.*labels\.csv)")
def image_folder(random, folder):
    """Pictures, names, labels.csv and links; what lies beside the folder must not be read."""
    inside, outside = folder / "pictures", folder / "outside"
    inside.mkdir()
    outside.mkdir()
    secret = np.full((8, 8, 3), 201, np.uint8)
    Image.fromarray(secret).save(outside / "secret.png")
    kind = random.randrange(5)
    for number in range(3):
        names = ("0", "1_cat", "2-<b>") if kind == 0 else ("",)
        child = inside / random.choice(
            names if kind else (*names, "99999999999", "\u0663", "3" * 200, "x", "4294967295")
        )
        child.mkdir(exist_ok=True)
        suffix = random.choice((".png", ".jpg", ".bmp", ".PNG"))
        content = random.choice(pictures())
        if kind in (0, 1) and not whole(random):
            content = mutations.picture(random, pictures())
        (child / f"{number}{suffix}").write_bytes(content)
    if kind == 2:
        random.choice((link, listed))(random, inside, outside)
    elif kind == 3:
        listed(random, inside, outside)
    size = random.choice((None, None, 8, 8, 1, 20_000, 10**9))
    found, _ = load_images(str(inside), size, random.choice((None, 1, 3)))
    for row in range(found.count):
        picture, _ = found.part(np.array([row]))
        assert picture.dtype == np.uint8 and picture.nbytes <= 2**28
        assert not (picture.shape[1] <= 20 and (picture == 201).all()), "a file out of the folder was read"


def link(random, inside, outside):
    path = inside / "link.png"
    path.symlink_to(
        random.choice((outside / "secret.png", "../outside/secret.png", "/etc/passwd", "link.png", "0.png"))
    )


def listed(random, inside, outside):
    name = random.choice(
        (
            "../outside/secret.png",
            str(outside / "secret.png"),
            "link.png",
            "0.png",
            "a" * 300,
            "\0",
            *mutations.TEXTS[:-3],
        )
    )
    (inside / "link.png").symlink_to(outside / "secret.png")
    there = next(inside.glob("0.*")).name
    label = random.choice(("0", "1", "-1", "1e3", "99999999999", "\u0663", "9" * 5000, "", "2147483648"))
    text = f"file,label\n{there},0\n{name},{label}\n"
    content = text.encode("utf-8", "surrogatepass")
    (inside / "labels.csv").write_bytes(mutations.damaged(random, content) if random.random() < 0.4 else content)
