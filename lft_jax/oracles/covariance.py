"""How the random directions of a zeroth-order oracle are spread: along which coordinates, and how far.

An optimizer whose state has a field `sampling` hands it to the oracle (`lft_jax.fine_tune`). It holds one of

- `deviation`, like `theta`: the standard deviation of each coordinate, up to a common factor;
- `subspace`, like `theta` with one more, leading axis `[k]`: vectors whose span takes half of the variance.

Either is a symmetric linear map `A` of isotropic directions `e` with `tr(A^2) = d`, so that `u = A e` are as long as
`e`, in root mean square. On a linear function of gradient `g` the estimate, a mean of `(u . g) u`, has the expectation
`A^2 g`. Shape letters: `d` coordinates of `theta`, all its leaves together, `k` vectors, `n` directions.
"""

import jax
import jax.numpy as jnp

from lft_jax.base import PyTree, safe_sqrt

#: The part of the variance that a subspace leaves to all coordinates alike (alpha of Maheswaranathan et al. 2019).
ISOTROPIC = 0.5


def root(theta: PyTree, sampling: dict[str, PyTree], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """The map `A` over the coordinates of all leaves together, for `spread`; empty for an empty `sampling`.

    Returns:
      `{"deviation": [d]}` of root mean square 1 (all 1 where nothing is given but zeros), or `{"subspace": [k, d]}`,
      orthonormal rows, or zeros in place of those that depend on others.

    Raises:
      ValueError: for two of them, an unknown one, or one that is not like `theta`.
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
    """`A e` of isotropic directions `[n, d]`, with what `root` returned."""
    if "deviation" in root:
        return us * root["deviation"][None]
    if "subspace" in root:
        basis = root["subspace"]
        dimension = jnp.sum(basis * basis)
        isotropic = jnp.where(dimension > 0, ISOTROPIC, 1).astype(us.dtype)
        along = isotropic + (1 - isotropic) * us.shape[1] / jnp.maximum(dimension, 1)
        # No accelerator is to round these products to fewer bits.
        inside = jnp.matmul(jnp.matmul(us, basis.T, precision="highest"), basis, precision="highest")
        return jnp.sqrt(isotropic) * us + (jnp.sqrt(along) - jnp.sqrt(isotropic)) * inside
    return us


def _shapes(tree, leading):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(x)[leading:] for x in leaves]
