"""Zeroth-order gradient estimates from finite differences along random directions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lft_jax import _memory
from lft_jax.base import Estimate, Oracle, PyTree, check_name, check_positive, safe_sqrt
from lft_jax.oracles import _probing, covariance
from lft_jax.oracles._checks import check_count, check_losses
from lft_jax.oracles.directions import BASES, DRAW, Subspace, direction_seeds, flatten


def zeroth_order(
    loss_fn: Callable[[PyTree], Any],
    *,
    num_directions: int = 20,
    smoothing: float = 1e-3,
    directions: str = "gaussian",
    antithetic: bool = False,
    resolution: int | None = None,
    basis: str = "tiles",
    evaluations: int = 1,
    chunk_size: int | None = None,
    memory_mib: float | None = None,
    opaque: bool = False,
) -> Oracle:
    """An estimate of the gradient from values of the loss alone.

    With directions `u_i`, smoothing `mu` and `c = d / E|u|^2` (so that `E[c u u^T] = I`) the estimate is::

        c / q * sum_i (f(theta + mu u_i) - f(theta)) / mu * u_i                     forward, the default
        c / q * sum_i (f(theta + mu u_i) - f(theta - mu u_i)) / (2 mu) * u_i        antithetic

    For a smooth loss its expectation is the gradient up to O(mu^2), or O(mu) for "coordinate" forward. Curvature
    adds noise of size O(mu) to the forward form and none to the antithetic one. Differences are taken in the dtype of
    the loss and have to stand out there: in float32 choose `mu` about 1e-3 (1e-6 fails). The points are rounded to
    the dtype of `theta`: in bfloat16 keep `mu` well above `|theta| / 256`.

    Args:
      loss_fn: `theta -> []`, any floating-point dtype. It is evaluated under `jax.vmap` and never differentiated.
      num_directions: `q`, at least 1.
      smoothing: `mu`, above 0, in units of `theta`.
      directions: what `u` is.
        "gaussian": N(0, I).
        "sphere": uniform on the unit sphere of the whole optimizee, over all leaves jointly (with a `resolution`, on
        that of the subspace); `c = d`. The step is
        `mu` long, so coordinates move `sqrt(d)` times less than with "gaussian" or "rademacher" at the same `mu`.
        "rademacher": -1 or 1 in each coordinate (SPSA).
        "coordinate": axes, `q <= d` distinct ones at random; `c = d`. With `q = d` the estimate is the
        deterministic finite-difference gradient.
      antithetic: evaluate `theta + mu u` and `theta - mu u`, and not `theta`. The oracle's value is then the mean over
        all these points, the best estimate there is without another query.
      resolution: `r`, at least 1: directions lie in a subspace of about r x r dimensions for leaves `[H, W]` and
        `[H, W, C]` (each channel on its own), about r for any other leaf's line of coordinates. The estimate is then
        one of the gradient's projection onto it, with as much less noise as it has fewer dimensions. None for all
        of them, which an `r` of at least the sides comes to as well. Not for "coordinate".
      basis: of that subspace. "tiles": directions are constant on tiles. "dct": they are made of the lowest
        frequencies of a discrete cosine transform.
      evaluations: examples that one evaluation of the loss costs, at least 1. An answer costs
        `(q + 1) * evaluations` queries, or `2 * q * evaluations` if antithetic.
      chunk_size: how many directions are in memory and evaluated together (if antithetic, twice as many points);
        None for all, or for as many as `memory_mib` allows. It changes the estimate by no more than rounding.
      memory_mib: MiB that a chunk may take, as far as can be told without compiling: its directions and points, and
        the largest operation on them of a loss that is not opaque. At least one direction is tried at a time.
      opaque: whether JAX cannot trace `loss_fn`. Then it is a *batched* loss, `thetas -> [n]`: it gets writable NumPy
        arrays, like `theta` with a leading axis `[n]`, `n` at most the number of points in a chunk, and returns
        anything that `np.asarray` takes. Such an oracle runs eagerly, not under jit, vmap or scan.

    Returns:
      An oracle without extras. Its grads have the dtypes of `theta`; sums are taken in at least float32. It also takes
      a keyword `deviation` or `subspace`, how the directions are spread (`lft_jax.oracles.covariance`). Differentiated
      with respect to that, the losses are constants, as in ZO-L2L (Ruan et al. 2020): no derivative of the model
        is taken.

    Raises:
      ValueError: for an argument out of range; when called, for a `theta` without coordinates or with leaves that
        are not floating-point, a loss of another shape, more "coordinate" directions than coordinates, or an opaque
        loss under a JAX transformation.

    References:
      Nesterov & Spokoiny (2017), Random gradient-free minimization of convex functions ("gaussian").
      Flaxman, Kalai & McMahan (2005), Online convex optimization in the bandit setting ("sphere").
      Spall (1992), Multivariate stochastic approximation using a simultaneous perturbation ("rademacher").
    """
    _check_directions(num_directions, smoothing, directions, resolution, basis)
    check_count("evaluations", evaluations)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if memory_mib is not None:
        check_positive("memory_mib", memory_mib)
    batched_loss, scan = (
        (_probing.on_numpy(loss_fn), _probing.eager_scan) if opaque else (jax.vmap(loss_fn), jax.lax.scan)
    )
    queries = _evaluations(num_directions, antithetic) * evaluations

    def losses_at(points):
        return check_losses("loss_fn", batched_loss(points), len(jax.tree.leaves(points)[0]))

    def oracle(theta, key, **sampling):
        flat, unflatten = flatten(theta)
        root = covariance.root(theta, sampling, flat.dtype)
        subspace = Subspace.of(theta, resolution, basis)
        seeds = direction_seeds(directions, key, num_directions, subspace.size)
        base = None if antithetic else losses_at(unflatten(flat[None]))
        chunk = min(chunk_size or num_directions, num_directions)
        if chunk_size is None and memory_mib is not None:
            work = 0 if opaque else _memory.working_bytes(loss_fn, theta)
            points = 1 + antithetic
            chunk = _memory.fitting(num_directions, (1 + points) * flat.nbytes + points * work, memory_mib)

        def step(total, seeds):
            us, points = _probing.probe(
                flat, seeds, smoothing, root, subspace, directions=directions, antithetic=antithetic
            )
            values = losses_at(unflatten(points))
            if antithetic:
                plus, minus = values[: len(seeds)], values[len(seeds) :]
                slopes, values = (plus - minus) / 2, (plus + minus) / 2
            else:
                slopes = values - base
            return _probing.accumulate(total, us, slopes, smoothing), values

        total, values = _probing.in_chunks(scan, step, jnp.zeros_like(flat), seeds, chunk)
        total = subspace.project(total * _probing.factor(directions, subspace, num_directions))
        grads = jax.tree.map(lambda g: g[0], unflatten(covariance.spread(total[None], root)))
        value = jnp.mean(values) if antithetic else jnp.asarray(base[0])
        return Estimate(value, grads, jnp.asarray(queries, jnp.int32), {})

    return oracle


def per_example_zeroth_order(
    example_losses: Callable[[PyTree], Any],
    *,
    num_examples: int,
    num_directions: int = 20,
    smoothing: float = 1e-3,
    directions: str = "gaussian",
    antithetic: bool = False,
    resolution: int | None = None,
    basis: str = "tiles",
    opaque: bool = False,
) -> Oracle:
    """`zeroth_order` of a mean over examples, each of which tries directions of its own: more of them for one price.

    For as many queries the mean loss is tried along `S` times the directions. Where the examples' gradients agree,
    the estimate has `S` times less noise; where they have nothing in common, as much (the variance of a direction is
    in proportion to the squared norm of the gradient along it, be it the mean's or an example's).

    Args:
      example_losses: `thetas -> [S]`, as for `per_example_gradient`. It is evaluated and never differentiated.
      num_examples: `S`, at least 1.
      num_directions: `q`, at least 1, of each example.
      smoothing, directions, antithetic, resolution, basis: as for `zeroth_order`.
      opaque: whether JAX cannot trace `example_losses`, as for `zeroth_order`.

    Returns:
      An oracle with the extra `spread`, as of `per_example_gradient`, here of the examples' estimates: it tells how
      noisy the mean is. An answer costs `2 * q * S` queries if antithetic, else `(q + 1) * S`. It takes the keywords
      of `zeroth_order`'s.

    Raises:
      ValueError: as for `zeroth_order`.
    """
    _check_directions(num_directions, smoothing, directions, resolution, basis)
    check_count("num_examples", num_examples)
    batched_loss, scan = (
        (_probing.on_numpy(example_losses), _probing.eager_scan) if opaque else (example_losses, jax.lax.scan)
    )
    queries = _evaluations(num_directions, antithetic) * num_examples

    def oracle(theta, key, **sampling):
        flat, unflatten = flatten(theta)
        root = covariance.root(theta, sampling, flat.dtype)
        subspace = Subspace.of(theta, resolution, basis)
        keys = jax.random.split(key, num_examples)
        seeds = [direction_seeds(directions, k, num_directions, subspace.size) for k in keys]

        def losses_at(points):
            return check_losses("example_losses", batched_loss(unflatten(points)), num_examples)

        base = None if antithetic else losses_at(jnp.broadcast_to(flat, (num_examples, flat.size)))

        def step(total, seeds):
            us, points = _probing.probe(
                flat, seeds, smoothing, root, subspace, directions=directions, antithetic=antithetic
            )
            plus = losses_at(points[:num_examples])
            minus = losses_at(points[num_examples:]) if antithetic else base
            slopes, values = ((plus - minus) / 2, (plus + minus) / 2) if antithetic else (plus - minus, minus)
            return total + slopes.astype(total.dtype)[:, None] / smoothing * us, values

        total, values = scan(step, jnp.zeros((num_examples, flat.size), flat.dtype), jnp.stack(seeds, axis=1))
        total = jax.vmap(subspace.project)(total * _probing.factor(directions, subspace, num_directions))
        total = covariance.spread(total, root)
        moments = jnp.stack([jnp.mean(total, axis=0), safe_sqrt(jnp.var(total, axis=0))])
        grads, spread = (jax.tree.map(lambda x, row=row: x[row], unflatten(moments)) for row in (0, 1))
        return Estimate(jnp.mean(jnp.asarray(values)), grads, jnp.asarray(queries, jnp.int32), {"spread": spread})

    return oracle


@dataclasses.dataclass(frozen=True)
class ZerothOrder:
    """Zeroth-order oracles with their settings: how a model that can only be evaluated is reached.

    The `estimator` of `lft_jax.uap_family`, and the `oracle` of `lft_jax.universal_perturbation`. Two of equal
    settings are equal, so families that differ only in their victim's weights share a compilation.

    Attributes:
      num_directions, smoothing, directions, antithetic, resolution, basis: as for `zeroth_order`.
      per_example: whether each example tries directions of its own (`per_example_zeroth_order`).
    """

    num_directions: int = 10
    smoothing: float = 1e-2
    directions: str = "rademacher"
    antithetic: bool = True
    resolution: int | None = None
    basis: str = "tiles"
    per_example: bool = False

    @property
    def evaluations(self) -> int:
        """Of each example's loss, for one answer."""
        return _evaluations(self.num_directions, self.antithetic)

    def __call__(self, example_losses: Callable[[PyTree], Any], *, num_examples: int, opaque: bool = False) -> Oracle:
        """The oracle of the mean of `example_losses`, `theta -> [S]` of one for all examples or of a copy for each.

        With `opaque` JAX does not trace `example_losses`: it is given NumPy arrays, and the oracle runs eagerly.
        """
        options = {**dataclasses.asdict(self), "opaque": opaque}
        if options.pop("per_example"):
            return per_example_zeroth_order(example_losses, num_examples=num_examples, **options)

        def mean_loss(theta):
            return jnp.mean(jnp.asarray(example_losses(theta)))

        def mean_losses(thetas):  # an opaque loss takes its points as a batch
            return jnp.stack([mean_loss(jax.tree.map(lambda x, i=i: x[i], thetas)) for i in range(_length(thetas))])

        return zeroth_order(mean_losses if opaque else mean_loss, evaluations=num_examples, **options)


def _length(batch):
    return len(jax.tree.leaves(batch)[0])


def zeroth_order_value_and_grad(
    loss_fn: Callable[[PyTree], jax.Array],
    *,
    num_directions: int = 20,
    smoothing: float = 1e-3,
    directions: str = "gaussian",
    antithetic: bool = False,
    resolution: int | None = None,
    basis: str = "tiles",
    chunk_size: int | None = None,
    memory_mib: float | None = None,
) -> Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]]:
    """Like `jax.value_and_grad(loss_fn)`, by finite differences: `(theta, key) -> (value [], grads like theta)`.

    Arguments, estimates and errors are those of `zeroth_order`.
    """
    oracle = zeroth_order(
        loss_fn,
        num_directions=num_directions,
        smoothing=smoothing,
        directions=directions,
        antithetic=antithetic,
        resolution=resolution,
        basis=basis,
        chunk_size=chunk_size,
        memory_mib=memory_mib,
    )
    return lambda theta, key: oracle(theta, key)[:2]


def _evaluations(num_directions, antithetic):
    """Points that an estimate evaluates the loss at."""
    return 2 * num_directions if antithetic else num_directions + 1


def _check_directions(num_directions, smoothing, directions, resolution, basis):
    check_count("num_directions", num_directions)
    check_positive("smoothing", smoothing)
    check_name("directions", directions, DRAW)
    check_name("basis", basis, BASES)
    if resolution is not None:
        check_count("resolution", resolution)
        if directions == "coordinate":
            raise ValueError("resolution: directions='coordinate' are axes, which no subspace holds; leave it out.")
