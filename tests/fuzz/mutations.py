"""Damages files: bytes, JSON values, headers of `.npy`, archives and PNG pictures. Each takes a `random.Random`."""

import io
import json
import math
import pickle
import struct
import zipfile
import zlib

import numpy as np

#: Values that readers of numbers trip over.
NUMBERS = (
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**9,
    10**30,
    10**400,
    1e308,
    5e-324,
    0.5,
    math.nan,
    math.inf,
)
TEXTS = (
    "",
    "\0",
    "..",
    "../../outside/secret.png",
    "/etc/passwd",
    "\ud800",
    "é",
    "x" * 5000,
    "<script>",
    "%s{0}",
    "1e999999999",
)
SHAPES = (
    "(1000000000000,)",
    "(4294967296, 4294967296, 3)",
    "(-1, 4, 3)",
    "(0, 99999999999999999999)",
    "(4, 4, 4)",
    "(4.0, 4, 3)",
    "(True, 4, 3)",
    "()",
    "(" + "9" * 300 + ",)",
    "(1,) * 10**9",
    "(" * 90 + ")" * 90,
    "(300000, 300000)",
)
DTYPES = ("'|O'", "'O'", "'<f8'", "'<U999999999'", "'<U0'", "'V8'", "'<M8[s]'", "'|b1'", "'>f4'", "'<c8'", "'<f16'")
DTYPES += ("[('a', '<f4')]", "[('a', '|O')]", "'<f4, <f4'", "None", "'(1000000000,)f8'", "'f3'", "'<i8'", "'|S1'")


class Trap:
    """Would make a file if it were unpickled."""

    path = "unpickled"

    def __reduce__(self):
        return open, (self.path, "w")


def trap():
    """A pickle that makes the file `Trap.path`."""
    return pickle.dumps(Trap())


def damaged(random, content):
    """Bytes with one to four random changes."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        place, length = random.randrange(len(content) + 1), random.choice((1, 2, 4, 8, 64, 1024))
        kind = random.randrange(9)
        if kind == 0 and content:
            content[min(place, len(content) - 1)] ^= 1 << random.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = random.randbytes(length)
        elif kind == 4:
            content[place : place + length] = random.randbytes(length)
        elif kind == 5:
            content[place:place] = content[place : place + length] * random.randrange(1, 20)
        elif kind == 6:
            whole = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
            content[place : place + 8] = whole.to_bytes(8, random.choice(("little", "big")))
        elif kind == 7:
            content[place:place] = bytes(length)
        else:
            content = bytearray(random.choice((b"", b"\0", trap(), b"PK\x03\x04", b"\x93NUMPY", b"\xff\xfe")) + content)
    return bytes(content)


def odd(random, depth=0):
    """A JSON value that is none that was expected."""
    kind = random.randrange(8)
    if kind == 0:
        return random.choice((None, True, False))
    if kind <= 2:
        return random.choice(NUMBERS)
    if kind <= 4:
        return random.choice(TEXTS)
    if kind == 5 and depth < 3:
        return [odd(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 6 and depth < 3:
        return {random.choice(TEXTS): odd(random, depth + 1) for _ in range(random.randrange(3))}
    return random.choice(([], {}, [[]], [0] * 1000))


def changed(random, value):
    """A JSON value with one random part replaced, removed or repeated."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        value, key = dict(value), random.choice(list(value))
        kind = random.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[random.choice(TEXTS)] = value[key]
        else:
            value[key] = changed(random, value[key])
        return value
    if isinstance(value, list) and value and random.random() < 0.8:
        value, place = list(value), random.randrange(len(value))
        kind = random.randrange(6)
        if kind == 0:
            del value[place]
        elif kind == 1:
            value *= random.choice((0, 2, 100))
        else:
            value[place] = changed(random, value[place])
        return value
    return odd(random)


def json_text(random, value):
    """The bytes of a JSON file: a changed value, deep nesting, or damaged text."""
    kind = random.randrange(10)
    if kind == 0:
        return damaged(random, json.dumps(value).encode())
    if kind == 1:
        depth = random.choice((50, 2000, 200_000))
        return random.choice((b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth))
    for _ in range(random.choice((1, 1, 2, 3))):
        value = changed(random, value)
    text = json.dumps(value)
    if kind == 2:
        text = text.replace("0", "9" * random.choice((30, 5000)), 1)
    return text.encode("utf-16" if kind == 3 and random.random() < 0.2 else "utf-8")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_file(random, array):
    """The bytes of an `.npy` file: a header that lies, values out of range, another array, or damage."""
    kind = random.randrange(6)
    if kind <= 1:
        shape = random.choice(SHAPES) if random.random() < 0.7 else str(array.shape)
        dtype = random.choice(DTYPES) if random.random() < 0.7 else f"'{array.dtype.str}'"
        order = random.choice(("False", "False", "True", "None"))
        header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}"
        header = header + random.choice(("", " " * 100, "+" * 200, " " * 70_000, "#\0"))
        version = random.choice((b"\x01\x00",) * 4 + (b"\x02\x00", b"\x03\x00", b"\x09\x09"))
        length = random.choice((len(header) + 1,) * 5 + (2**16 - 1, 2**32 - 1, 0))
        digits = 2 if version == b"\x01\x00" else 4
        length = (length % 256**digits).to_bytes(digits, "little")
        return b"\x93NUMPY" + version + length + header.encode() + b"\n" + array.tobytes()
    if kind == 2:
        other = np.array(array)
        if other.size and other.dtype.kind in "iuf":
            number = random.choice(NUMBERS)
            with np.errstate(all="ignore"):
                fits = (other.dtype.kind == "f" and abs(number) < 10**300) or (
                    other.dtype.kind != "f" and number == number
                )
                limits = np.iinfo(other.dtype) if other.dtype.kind in "iu" else None
                if fits and (limits is None or limits.min <= number <= limits.max):
                    other.flat[random.randrange(other.size)] = number
        return npy(other)
    if kind == 3:
        with np.errstate(all="ignore"):
            kinds = ("f2", "f8", ">f4", "i1", ">i8", "u8", "c8", "S3", "U2", "?", "f16")
            other = array.astype(random.choice(kinds)) if array.dtype.kind in "iufb" else array
        forms = (other, other.ravel()[:0], other[None], other.T, other.ravel(), np.zeros(()), np.flip(other))
        return npy(random.choice(forms))
    return damaged(random, npy(array))


def stored(entries):
    """The bytes of a zip file of `{name: content}`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return file.getvalue()


def archive(random, entries):
    """The bytes of a zip file of `{name: content}`: lies, bombs, odd names, other compression, or damage."""
    kind = random.randrange(8)
    method = random.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    file = io.BytesIO()
    entries = dict(entries)
    name = random.choice(list(entries))
    if kind == 0:
        entries[random.choice(("../../outside/x.npy", "/tmp/x.npy", "a" * 5000, "\ud7ff.npy", "x.txt"))] = entries.pop(
            name
        )
    elif kind == 1:
        entries[name] = bytes(random.choice((2**16, 2**20)))
        method = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    elif kind == 2:
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as nested:
            nested.writestr("images.npy", bytes(2**20))
        entries[name] = inner.getvalue()
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as made:
        for each, content in entries.items():
            made.writestr(zipfile.ZipInfo(each) if method == zipfile.ZIP_STORED else each, content)
    content = bytearray(file.getvalue())
    if kind == 3:  # sizes in the directory
        place = content.rfind(b"PK\x01\x02")
        struct.pack_into("<I", content, place + random.choice((16, 20, 24, 42)), random.choice((0, 2**31, 2**32 - 2)))
    elif kind == 4:
        content[content.rfind(b"PK\x01\x02") + 8] |= random.choice((1, 8, 64))
    elif kind >= 6:
        return damaged(random, content)
    return bytes(content)


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, texts=(), *, bits=8, colour=2, rows=None):
    """The bytes of a PNG file, whose header may claim more than there is."""
    pixels = b"\0" + bytes(4 * min(width, 64)) if rows is None else rows
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    text = b"".join(png_chunk(b"tEXt", key.encode() + b"\0" + value.encode()) for key, value in texts)
    body = png_chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + text + body + png_chunk(b"IEND", b"")


def picture(random, contents, texts=()):
    """The bytes of a picture: damage, a header that lies with a right checksum, or odd texts."""
    kind = random.randrange(4)
    if kind == 0:
        sides = random.choice(((2**31 - 1, 2**31 - 1), (0, 4), (100_000, 100_000), (1, 60_000), (8000, 8000), (4, 4)))
        return png(*sides, texts, bits=random.choice((1, 8, 16, 3)), colour=random.choice((0, 2, 3, 4, 6, 9)))
    if kind == 1 and texts:
        value = random.choice(
            ("nan", "inf", "-1", "1e999", "", "0x8", "1" * 5000, "1_0", "\u0661".encode().decode("latin1"))
        )
        return png(4, 4, [(texts[0][0], value)], rows=b"".join(b"\0" + bytes(range(12)) for _ in range(4)))
    return damaged(random, random.choice(contents))
