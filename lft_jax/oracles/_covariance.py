"""The covariance of the random directions of a zeroth-order oracle.

An optimizer whose state has a field `sampling` sets it (`lft_jax.fine_tune` passes the field to the oracle). The field
holds one of

- `deviation`, like `theta`: the standard deviation of each coordinate, up to a common factor;
- `subspace`, like `theta` with one more, leading axis `[k]`: vectors whose span receives half of the variance, as in
  guided evolution strategies (Maheswaranathan et al. 2019, arXiv 1806.10230).

Either defines a symmetric linear map `A` with `tr(A^2) = d`. Directions are `u = A e` for isotropic `e`, and have the
same root mean square length as `e`. On a linear function with gradient `g` the estimate, a mean of `(u . g) u`, has
the expectation `A^2 g`. Shape letters: `d` coordinates of `theta` over all its leaves, `k` vectors, `n` directions.
"""

import jax
import jax.numpy as jnp

from lft_jax.base import PyTree, safe_sqrt

#: Share of the variance that is isotropic when a subspace is given (alpha of arXiv 1806.10230).
ISOTROPIC = 0.5


def root(theta: PyTree, sampling: dict[str, PyTree], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """The map `A` over the coordinates of all leaves, in the form that `spread` takes.

    Args:
      theta: the optimizee.
      sampling: `{"deviation": ...}`, `{"subspace": ...}`, or empty for isotropic directions.
      dtype: dtype of the result.

    Returns:
      `{"deviation": [d]}` with root mean square 1 (all ones if the given deviation is zero everywhere),
      `{"subspace": [k, d]}` with orthonormal rows (zeros in place of linearly dependent rows), or an empty dict.

    Raises:
      ValueError: for both entries at once, an unknown entry, or one that does not have the structure and shapes of
        `theta`.
    """
    if not sampling:
        return {}
    if len(sampling) != 1 or not sampling.keys() <= {"deviation", "subspace"}:
        raise ValueError(f"sampling must hold either deviation or subspace, got {sorted(sampling)}.")
    ((name, tree),) = sampling.items()
    leading = int(name == "subspace")
    expected, found = _shapes(theta, 0), _shapes(tree, leading)
    if expected != found:
        axis = " with one more, leading axis [k]" if leading else ""
        raise ValueError(f"{name} must be like theta{axis}: {expected}, got {found} (without that axis, if any).")
    parts = [jnp.asarray(x).astype(dtype) for x in jax.tree.leaves(tree)]
    flat = jnp.concatenate([x.reshape(*x.shape[:leading], -1) for x in parts], axis=-1)
    if leading:
        basis, triangle = jnp.linalg.qr(flat.T)
        lengths = jnp.abs(jnp.diagonal(triangle))
        independent = lengths > 1e-4 * jnp.max(lengths, initial=0)
        return {"subspace": jnp.where(independent[:, None], basis.T, 0)}
    rms = safe_sqrt(jnp.sum(flat * flat) / flat.size)
    return {"deviation": jnp.where(rms > 0, flat / jnp.where(rms > 0, rms, 1), 1)}


def spread(us: jax.Array, root: dict[str, jax.Array]) -> jax.Array:
    """`A e` for isotropic directions `[n, d]`; `root` is the result of the function `root`."""
    if "deviation" in root:
        return us * root["deviation"][None]
    if "subspace" in root:
        basis = root["subspace"]
        dimension = jnp.sum(basis * basis)
        isotropic = jnp.where(dimension > 0, ISOTROPIC, 1).astype(us.dtype)
        along = isotropic + (1 - isotropic) * us.shape[1] / jnp.maximum(dimension, 1)
        # Full precision on accelerators too.
        inside = jnp.matmul(jnp.matmul(us, basis.T, precision="highest"), basis, precision="highest")
        return jnp.sqrt(isotropic) * us + (jnp.sqrt(along) - jnp.sqrt(isotropic)) * inside
    return us


def _shapes(tree, leading):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(x)[leading:] for x in leaves]
