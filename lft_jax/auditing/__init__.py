"""An audit of a classifier: many universal attacks, and a page that says what they found.

How the modules compose::

    labels --stratified, seeded--> support, choice and query images                          `_split`
    budget, radii --make_plan--> cells, one for each run                                     `_plan`
    model, cells --universal_perturbation--> runs, stored as they end                        `_audit`, `_store`
    runs --choice images--> the strongest; --query images--> rates with intervals            `_findings`, `_statistics`
    findings --_words, _plots, jinja2--> index.html; report.json, junit.xml, .npy            `_page`, `_junit`, `report`
    finished runs --> time left                                                              `_progress`

matplotlib, pillow and jinja2 (the extra `audit`) are imported when a page is made.
"""

from lft_jax.auditing._audit import audit
from lft_jax.auditing._plan import METHODS, AuditBudget
from lft_jax.auditing._split import stratified_rows
from lft_jax.auditing.report import AuditReport

__all__ = ["METHODS", "AuditBudget", "AuditReport", "audit", "stratified_rows"]
