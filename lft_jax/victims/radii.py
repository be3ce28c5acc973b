"""Default attack radii for the small victims of this package."""

#: Radii of balls by norm and source, in units of the image range. A perturbation of that size, optimized on the full
#: training data, fools about four in five images of a small victim.
DEFAULT_EPSILON = {
    "linf": {"digits": 0.25, "mnist_5k": 0.3, "mnist": 0.3, "cifar10": 0.06},
    "l2": {"digits": 1.8, "mnist_5k": 4.5, "mnist": 4.5, "cifar10": 2.0},
}


def default_epsilon(norm: str, source: str) -> float:
    """The default radius of a ball for an image source.

    Args:
      norm: "linf" or "l2".
      source: name of an image source, see `lft_jax.data.load_source`.

    Returns:
      The radius, in units of the image range [0, 1].

    Raises:
      ValueError: for the norm "l1", which has no ball here, or where `DEFAULT_EPSILON` has no radius.

    Examples:
      >>> default_epsilon("linf", "mnist")
      0.3
    """
    known = DEFAULT_EPSILON.get(norm, {})
    if norm == "l1":
        raise ValueError("norm: there is no 'l1' ball; give a penalty, or choose 'linf' or 'l2'.")
    if source not in known:
        raise ValueError(f"epsilon: no radius of an {norm} ball is known for source {source!r}; give one.")
    return known[source]
