import re
import sys

import numpy as np
import pytest

from lft_jax.cli._images import Images, choose, load_images, unseen

Image = pytest.importorskip("PIL.Image")


def picture(path, value=0, size=(6, 4), mode="RGB"):
    """A picture of one value, `size` wide and high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def everything(images):
    return images.part(np.arange(images.count))


def test_arrays_of_an_npz_file(tmp_path):
    path = str(tmp_path / "x.npz")
    x = np.linspace(0, 1, 2 * 3 * 3).reshape(2, 3, 3)
    np.savez(path, images=x)
    images, test = load_images(path)
    found, labels = everything(images)
    assert (found.shape, found.dtype, labels, test) == ((2, 3, 3, 1), np.float32, None, None)
    np.savez(path, images=x, labels=np.array([3, 0]), test_images=x[:1], test_labels=np.array([1]))
    images, test = load_images(path)
    assert images.labels.tolist() == [3, 0] and test.labels.tolist() == [1] and test.count == 1


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros(3)}, "must have an array 'images', got x"),
        ({"images": np.full((2, 4, 4, 1), 7.0)}, r"arrays 'images' and 'labels': images must lie in \[0, 1\]"),
        ({"images": np.zeros((2, 4, 4, 1)), "labels": np.zeros(3, int)}, r"labels must be \[N\] = \(2,\)"),
        (
            {"images": np.zeros((2, 4, 4, 1)), "test_images": np.zeros((2, 5, 5, 1))},
            r"test_images must be \[N, \(4, 4, 1\)\] as images, got \(5, 5, 1\)",
        ),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        load_images(str(tmp_path / "x.npz"))


def test_what_is_neither_a_folder_nor_an_npz_file_is_refused(tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"damaged.npz cannot be read as an .npz file"):
        load_images(str(tmp_path / "damaged.npz"))
    with pytest.raises(ValueError, match=r"expected a folder of pictures or an .npz file, got .*nowhere"):
        load_images(str(tmp_path / "nowhere"))
    np.savez(tmp_path / "x.npz", images=np.zeros((1, 4, 4, 1)))
    with pytest.raises(ValueError, match="--image_size and --image_channels are for a folder"):
        load_images(str(tmp_path / "x.npz"), size=3)


def test_pictures_without_labels(tmp_path):
    picture(tmp_path / "b.png", 20)
    picture(tmp_path / "a.BMP", 10)
    picture(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("")
    images, test = load_images(str(tmp_path))
    found, labels = everything(images)
    assert (found.shape, found.dtype, labels, test) == ((2, 4, 6, 3), np.uint8, None, None)
    assert found[:, 0, 0, 0].tolist() == [10, 20]


def test_grey_pictures_have_one_channel_unless_some_are_not_or_three_are_wanted(tmp_path):
    picture(tmp_path / "a.png", 5, mode="L")
    assert everything(load_images(str(tmp_path))[0])[0].shape == (1, 4, 6, 1)
    assert everything(load_images(str(tmp_path), channels=3)[0])[0].shape == (1, 4, 6, 3)
    picture(tmp_path / "b.png", 5, mode="RGBA")
    assert everything(load_images(str(tmp_path))[0])[0].shape == (2, 4, 6, 3)
    assert everything(load_images(str(tmp_path), channels=1)[0])[0].shape == (2, 4, 6, 1)


def test_sub_folders_are_numbers_of_classes(tmp_path):
    for name, value in (("0/a.png", 1), ("3_cat/b.jpg", 200), ("12-dog/c.png", 3), (".x/y.png", 4)):
        picture(tmp_path / name, value)
    (tmp_path / "empty").mkdir()
    images, _ = load_images(str(tmp_path))
    found, labels = everything(images)
    assert dict(zip(labels.tolist(), found[:, 0, 0, 0].tolist(), strict=True)) == {0: 1, 12: 3, 3: 200}


def test_labels_of_a_table(tmp_path):
    for name, value in (("a.png", 1), ("deep/b.png", 2), ("c.png", 3)):
        picture(tmp_path / name, value)
    (tmp_path / "labels.csv").write_text("label,file,note\n7,deep/b.png,x\n0,a.png,\n", encoding="utf-8-sig")
    found, labels = everything(load_images(str(tmp_path))[0])
    assert found[:, 0, 0, 0].tolist() == [2, 1] and labels.tolist() == [7, 0]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("a.png,0\n", r"labels.csv: the first line must be file,label, got 'a.png,0'"),
        ("file,label\n", r"labels.csv: expected a line for each picture, got none"),
        ("", r"labels.csv: the first line must be file,label, got ''"),
        ("file,label\na.png,cat\n", r"labels.csv, line 2: label must be the number of a class, from 0, got 'cat'"),
        ("file,label\na.png,-1\n", r"line 2: label must be the number of a class"),
        ("file,label\na.png,1\nb.png,1\n", r"line 3: there is no file 'b.png'"),
        ("file,label\na.png\n", r"line 2: label must be"),
    ],
)
def test_wrong_tables_name_the_line(tmp_path, table, said):
    picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(ValueError, match=said):
        load_images(str(tmp_path))


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are no pictures \(.png, .jpg, .jpeg, .bmp\)"):
        load_images(str(tmp_path))
    picture(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"sub-folders must be named .* such as 3 or 3_cat, got 'cat'; rename it, or"):
        load_images(str(tmp_path))
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="in the folder or in its sub-folders, got both"):
        load_images(str(tmp_path))


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a.png is no picture that can be read"):
        load_images(str(tmp_path))
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])  # its header is right
    with pytest.raises(ValueError, match=r"a.png is no picture that can be read"):
        everything(load_images(str(tmp_path))[0])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="must have 8 bits per channel, got mode I"):
        load_images(str(tmp_path))


def test_sizes_that_differ_need_a_size(tmp_path):
    picture(tmp_path / "a.png", size=(6, 4))
    picture(tmp_path / "b.png", size=(4, 6))
    said = re.escape("got 6x4 (a.png) and 4x6 (b.png); pass --image_size=224")
    with pytest.raises(ValueError, match=said):
        load_images(str(tmp_path))
    assert everything(load_images(str(tmp_path), size=4)[0])[0].shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match="--image_size"):
        load_images(str(tmp_path), size=0)


def test_the_shorter_side_is_scaled_and_the_centre_cropped(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the middle third
    Image.fromarray(wide).save(tmp_path / "a.png")
    (found,), _ = everything(load_images(str(tmp_path), size=8)[0])
    assert np.all(found == 200)
    (small,), _ = everything(load_images(str(tmp_path), size=4)[0])
    assert small.shape == (4, 4, 3) and np.all(small[:, 1:3] == 200)
    (large,), _ = everything(load_images(str(tmp_path), size=16)[0])
    assert large.shape == (16, 16, 3) and np.all(large[:, 2:-2] == 200)


def test_a_missing_pillow_names_the_extra(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Pillow: pip install 'lft_jax\[images\]'"):
        load_images(str(tmp_path))


LABELLED = Images(6, np.array([2, 0, 2, 0, 2, 9]), lambda rows: rows)
BARE = Images(30, None, lambda rows: rows)


def test_images_of_each_class_are_chosen():
    rows = choose(LABELLED, None, None, 0)
    assert LABELLED.labels[rows].tolist() == [0, 2, 9]
    assert choose(LABELLED, 1, None, 0).tolist() == rows.tolist()
    assert len(set(choose(LABELLED, None, 5, 1).tolist())) == 5
    assert len(choose(BARE, None, None, 0)) == 10
    assert len(choose(Images(3, None, lambda rows: rows), None, None, 0)) == 3


@pytest.mark.parametrize(
    ("images", "shots", "num_images", "said"),
    [
        (LABELLED, 2, None, "shots: expected at most 1, the images of the smallest class, got 2"),
        (LABELLED, 1, 3, "--shots=1 and --num_images=3: expected at most one"),
        (LABELLED, 0, None, "shots"),
        (LABELLED, None, 7, "num_images: expected at most 6, all images, got 7"),
        (BARE, None, 0, "num_images"),
        (BARE, 1, None, "--shots=1: the images have no labels; pass --num_images"),
    ],
)
def test_wrong_numbers_of_images_are_refused(images, shots, num_images, said):
    with pytest.raises(ValueError, match=said):
        choose(images, shots, num_images, 0)


def test_unseen_images_are_all_others_or_those_given_apart():
    found, rows = unseen(BARE, None, np.arange(5, 30), None, 0)
    assert found is BARE and rows.tolist() == [0, 1, 2, 3, 4]
    found, rows = unseen(BARE, LABELLED, np.arange(30), None, 0)
    assert found is LABELLED and rows.tolist() == list(range(6))
    _, rows = unseen(BARE, None, np.arange(10), 4, 0)
    assert len(rows) == 4 and min(rows) >= 10
    assert not len(unseen(BARE, None, np.arange(30), 4, 0)[1])
    assert not len(unseen(BARE, None, np.arange(10), 0, 0)[1])
