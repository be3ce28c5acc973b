"""Cases of a property: how many are drawn, and a count of those that held."""

import collections
import functools
import os

from hypothesis import HealthCheck, given, settings

#: Cases of each property; `python -m tests.trust.properties` sets it.
CASES = int(os.environ.get("LFT_TRUST_CASES", "2"))
#: `{(property, its parameters): cases that held}`.
HELD: collections.Counter[tuple[str, str]] = collections.Counter()


def for_all(**strategies):
    """A test of a property, for `CASES` draws of its keyword arguments; its others are parameters of pytest."""

    def decorated(body):
        @functools.wraps(body)
        def counted(**arguments):
            body(**arguments)
            HELD[body.__name__, repr({k: v for k, v in arguments.items() if k not in strategies})] += 1

        return settings(max_examples=CASES, suppress_health_check=list(HealthCheck))(given(**strategies)(counted))

    return decorated
