"""Installs the wheel of a folder into an empty environment and checks that it works on its own."""

import pathlib
import subprocess
import sys
import tempfile
import venv
import zipfile

CHECK = """
import sys
import lft_jax
heavy = {"flax", "orbax", "tensorboardX", "tqdm", "matplotlib"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, f"import lft_jax loads {heavy}"
params, rule = lft_jax.load_pretrained("uap-linf")
print("lft_jax", lft_jax.__version__, "imported from", lft_jax.__file__)
"""


def main(folder: str) -> None:
    (wheel,) = pathlib.Path(folder).resolve().glob("*.whl")
    (sdist,) = pathlib.Path(folder).resolve().glob("*.tar.gz")
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    print(f"{wheel.name}: {len(zipfile.ZipFile(wheel).namelist())} files in {sorted(tops)}; {sdist.name}")
    assert all(top == "lft_jax" or top.endswith(".dist-info") for top in tops), tops
    with tempfile.TemporaryDirectory() as scratch:
        # A user's own folder of that name must neither break the package nor be taken for a part of it.
        own = pathlib.Path(scratch, "experiments")
        own.mkdir()
        (own / "__init__.py").write_text('raise ImportError("a folder of the user")\n')
        venv.create(pathlib.Path(scratch, "venv"), with_pip=True)
        python = pathlib.Path(scratch, "venv", "bin", "python")
        for installed in (wheel, sdist):
            # The sdist after the wheel, whose dependencies are there then.
            options = [] if installed == wheel else ["--no-deps", "--force-reinstall"]
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-input", *options, installed], check=True)
            subprocess.run([python, "-c", CHECK], cwd=scratch, check=True)
            for script, flag in (("lft-attack", "--victim"), ("lft-audit", "--fail_above")):
                shown = subprocess.run(
                    [python.with_name(script), "--help"], cwd=scratch, capture_output=True, text=True, check=False
                )
                assert flag in shown.stdout and "universal perturbation" in shown.stdout, shown
            templates = "import importlib.resources as r; print(*(r.files('lft_jax.auditing') / 'templates').iterdir())"
            found = subprocess.run(
                [python, "-c", templates], cwd=scratch, capture_output=True, text=True, check=True
            ).stdout
            assert "page.html" in found and "page.css" in found, found
    print("the wheel and the sdist install, import and run lft-attack and lft-audit")


if __name__ == "__main__":
    main(sys.argv[1])
