import collections
import dataclasses
import itertools

import pytest

from lft_jax.auditing import METHODS, AuditBudget
from lft_jax.auditing._plan import Cell, make_plan, radius
from lft_jax.tasks import PatternAttack

RADII = {"linf": (0.1, 0.2), "l2": (1.0, 2.0)}


def names(cells):
    return {cell.method for cell in cells}


def test_the_plan_has_each_radius_and_each_series_once():
    cells = make_plan(AuditBudget(), RADII, 50, differentiable=True)
    assert len(set(cells)) == len(cells) and names(cells) == set(AuditBudget().methods)
    kinds = collections.Counter((c.epsilon, c.images, c.size) for c in cells if c.method == "uap-linf")
    assert kinds == {
        (0.2, 10, 20): 3,
        (0.1, 10, 20): 3,
        (0.2, 10, 5): 3,
        (0.2, 10, 60): 3,
        (0.2, 1, 20): 3,
        (0.2, 5, 20): 3,
        (0.2, 50, 20): 1,  # all support images are one draw
    }
    assert {c.images for c in cells if c.method == "momentum"} == {10}
    kinds = {(c.epsilon, c.images, c.size) for c in cells if c.method == "patterns-l2"}
    assert kinds == {(1.0, 10, 500), (2.0, 10, 500)}  # series are in linf balls


def test_runs_that_share_a_compiled_step_follow_each_other():
    programs = [cell.program or cell.method for cell in make_plan(AuditBudget(), RADII, 50, True)]
    changes = sum(a != b for a, b in itertools.pairwise(programs))
    assert changes == len(set(programs)) - 1


def test_without_gradients_there_are_queries_only():
    assert names(make_plan(AuditBudget(), RADII, 50, False)) == {"patterns", "patterns-l2"}
    assert make_plan(AuditBudget(methods=("momentum",)), RADII, 50, False) == []


def test_series_are_in_l2_balls_where_there_are_no_others():
    cells = make_plan(AuditBudget(), {"linf": (), "l2": (2.0,)}, 50, True)
    assert names(cells) == {"uap-l2", "periodic-l2", "patterns-l2"}
    assert {c.images for c in cells} == {1, 5, 10, 50}


def test_a_few_support_images_are_all_that_there_are():
    cells = make_plan(AuditBudget(), RADII, 8, True)
    assert {cell.images for cell in cells} == {1, 5, 8}
    assert AuditBudget().standard(8) == {"images": 5, "steps": 20, "queries": 500}
    assert {cell.draw for cell in cells if cell.images == 8} == {0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"support_images": ()}, "support_images must be increasing numbers, at least one"),
        ({"steps": (20, 5)}, r"steps must be increasing numbers, at least one, got \(20, 5\)"),
        ({"steps": (0, 5)}, "steps must be at least 1"),
        ({"queries": (1,)}, "queries must be at least 2"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"query_images": 0}, "query_images must be at least 1"),
        ({"methods": ()}, "methods must be some of uap-linf"),
        ({"methods": ("pgd",)}, "methods"),
    ],
)
def test_wrong_budgets(changes, said):
    with pytest.raises(ValueError, match=said):
        AuditBudget(**changes).check()


def test_names_of_cells_are_names_of_files_and_different():
    cell = Cell("uap-linf", 8 / 255, 10, 20, 0)
    others = {"method": "momentum", "epsilon": 0.1, "images": 1, "size": 5, "draw": 1, "target": 3}
    cells = [cell, *(dataclasses.replace(cell, **{name: value}) for name, value in others.items())]
    assert len({c.name for c in cells}) == len(cells)
    assert all(set(c.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.") for c in cells)
    assert cell.title == "uap-linf, linf 8/255, 10 images, 20 steps"
    assert radius(1.0) == "1" and radius(2.0, "l2") == "2" and radius(0.0001) == "0.0001"


def test_every_method_has_a_style_and_options():
    from lft_jax.auditing._plan import options
    from lft_jax.auditing._plots import STYLES

    assert METHODS.keys() == STYLES.keys()
    for name in METHODS:
        assert options(name) is options(name) and "oracle" in options(name)


def test_searches_are_said_to_use_the_images_that_they_use():
    budget = AuditBudget(support_images=(1, 5, 10, 50), queries=(100, 500, 2000), draws=1, methods=("patterns",))
    cells = make_plan(budget, {"linf": (0.1,), "l2": ()}, 60, False)
    assert all(PatternAttack().images(cell.size, cell.images) == cell.images for cell in cells)
    assert {cell.images for cell in cells if cell.size == 500} == {1, 5, 10}


def test_the_series_are_of_a_norm_that_the_methods_have():
    budget = AuditBudget(support_images=(5,), steps=(5, 20), draws=1, methods=("uap-l2",))
    cells = make_plan(budget, {"linf": (0.1,), "l2": (1.0,)}, 60, True)
    assert {cell.size for cell in cells} == {5, 20}
