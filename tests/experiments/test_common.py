import sys
import types

from experiments import common


def test_provenance_names_the_module_that_runs_and_not_where_the_data_lay(monkeypatch):
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="benchmarks.meta_step"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/somewhere/meta_step.py", "--repeats=2", "--data_dir=/private"])
    assert common.provenance([0])["command"] == "python -m benchmarks.meta_step --repeats=2"
