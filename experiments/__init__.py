"""Research programs, run from a checkout: `python -m experiments.meta_train --help`. They are not installed."""
