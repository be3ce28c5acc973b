"""Zeroth-order estimates of a gradient, by finite differences along random directions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import _memory
from lft_jax.base import Estimate, Oracle, PyTree, check_count, check_name, check_positive, safe_sqrt
from lft_jax.oracles import _covariance, _probing
from lft_jax.oracles._checks import check_losses
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
    """Estimates the gradient from values of the loss alone, by finite differences along random directions.

    With directions `u_i`, smoothing `mu` and `c = d / E|u|^2` (so that `E[c u u^T] = I`) the estimate is::

        c / q * sum_i (f(theta + mu u_i) - f(theta)) / mu * u_i                     forward, the default
        c / q * sum_i (f(theta + mu u_i) - f(theta - mu u_i)) / (2 mu) * u_i        antithetic

    For a smooth loss its expectation is the gradient up to O(mu^2), or O(mu) for "coordinate" forward. Curvature
    adds noise of size O(mu) to the forward form and none to the antithetic one.

    Differences are taken in the dtype of the loss and must be visible there: in float32 choose `mu` about 1e-3 (1e-6
    fails). The points are rounded to the dtype of `theta`: in bfloat16 keep `mu` well above `|theta| / 256`.

    Args:
      loss_fn: `theta -> []`, of any floating-point dtype. It is evaluated under `jax.vmap` and never differentiated.
      num_directions: `q`, at least 1.
      smoothing: `mu`, above 0, in units of `theta`.
      directions: distribution of `u`.
        "gaussian": N(0, I).
        "sphere": uniform on the unit sphere of the whole optimizee, over all leaves jointly (with a `resolution`, on
        that of the subspace); `c = d`. A step has length `mu`, so coordinates move `sqrt(d)` times less than with
        "gaussian" or "rademacher" at the same `mu`.
        "rademacher": -1 or 1 in each coordinate (SPSA).
        "coordinate": `q <= d` distinct coordinate axes at random; `c = d`. With `q = d` the estimate is the
        deterministic finite-difference gradient.
      antithetic: evaluate `theta + mu u` and `theta - mu u`, and not `theta`. The value of the oracle is then the mean
        of the loss over all these points, an estimate that needs no further query.
      resolution: `r`, at least 1: directions lie in a subspace of about r x r dimensions for leaves `[H, W]` and
        `[H, W, C]` (separately per channel), and about r for any other leaf. The estimate is then that of the
        projection of the gradient onto the subspace; its variance falls in proportion to the dimensions. None for
        all dimensions; an `r` of at least the image sides has the same effect. Not for "coordinate".
      basis: basis of that subspace. "tiles": directions are constant on tiles. "dct": they are combinations of the
        lowest frequencies of a discrete cosine transform.
      evaluations: number of examples that one evaluation of the loss covers, at least 1. An answer costs
        `(q + 1) * evaluations` queries, or `2 * q * evaluations` if antithetic.
      chunk_size: number of directions that are in memory and evaluated together (if antithetic, twice as many
        points). None for all, or for as many as `memory_mib` allows. Changes the estimate only by rounding.
      memory_mib: memory budget of a chunk in MiB. Counted are its directions and points and, unless the loss is
        opaque, the largest operation of the loss on them; this is known without compiling. A chunk has at least one
        direction.
      opaque: whether `loss_fn` is a function that JAX cannot trace. It is then a *batched* loss, `thetas -> [n]`: it
        receives writable NumPy arrays, like `theta` with a leading axis `[n]`, where `n` is at most the number of
        points in a chunk, and returns anything that `np.asarray` takes. Such an oracle runs eagerly, not under jit,
        vmap or scan.

    Returns:
      An oracle `(theta, key, **sampling) -> Estimate` without extras. Its grads have the dtypes of `theta`; sums are
      taken in at least float32. The optional keyword `deviation` or `subspace` sets the covariance of the directions
      (`lft_jax.oracles._covariance`). When the estimate is differentiated with respect to that keyword, the losses are
      constants, as in ZO-L2L (Ruan et al. 2020): no derivative of the model is needed.

    Raises:
      ValueError: for an argument out of range; when called, for a `theta` without coordinates or with leaves that
        are not floating-point, a loss of another shape, more "coordinate" directions than coordinates, or an opaque
        loss under a JAX transformation.

    Examples:
      >>> oracle = zeroth_order(lambda theta: jnp.sum(theta**2), num_directions=2, directions="coordinate")
      >>> answer = oracle(jnp.array([1.0, 2.0]), jax.random.key(0))
      >>> [round(float(g), 1) for g in answer.grads], int(answer.queries)
      ([2.0, 4.0], 3)

      A loss in NumPy takes a batch of points:

      >>> oracle = zeroth_order(lambda x: (x**2).sum(axis=1), num_directions=50, antithetic=True, opaque=True)
      >>> answer = oracle(jnp.ones(3), jax.random.key(0))
      >>> answer.grads.shape, int(answer.queries)
      ((3,), 100)

    References:
      Nesterov & Spokoiny (2017), Random gradient-free minimization of convex functions ("gaussian").
      Flaxman, Kalai & McMahan (2005), Online convex optimization in the bandit setting ("sphere").
      Spall (1992), Multivariate stochastic approximation using a simultaneous perturbation ("rademacher").
      Ruan et al. (2020), Learning to learn by zeroth-order oracle, arXiv 1910.09464 (learned `deviation`).
    """
    _check_directions(num_directions, smoothing, directions, resolution, basis)
    check_count("evaluations", evaluations, 1)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, 1)
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
        root = _covariance.root(theta, sampling, flat.dtype)
        subspace = Subspace.of(theta, resolution, basis)
        seeds = direction_seeds(directions, key, num_directions, subspace.size)
        at_theta = None if antithetic else losses_at(unflatten(flat[None]))
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
            if at_theta is None:
                plus, minus = values[: len(seeds)], values[len(seeds) :]
                slopes, values = (plus - minus) / 2, (plus + minus) / 2
            else:
                slopes = values - at_theta
            return _probing.accumulate(total, us, slopes, smoothing), values

        total, values = _probing.in_chunks(scan, step, jnp.zeros_like(flat), seeds, chunk)
        total = subspace.project(total * _probing.factor(directions, subspace, num_directions))
        grads = jax.tree.map(lambda g: g[0], unflatten(_covariance.spread(total[None], root)))
        value = jnp.mean(values) if at_theta is None else jnp.asarray(at_theta[0])
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
    """`zeroth_order` of a mean over examples, with independent directions for each example.

    For the same number of queries, `S` times as many directions are evaluated. If the gradients of the examples are
    equal, the variance of the estimate is `S` times smaller than that of `zeroth_order`; if they are orthogonal, it is
    the same. (The variance along a direction is proportional to the squared norm of the gradient that is estimated:
    of the mean loss there, of one example's loss here.)

    Args:
      example_losses: `thetas -> [S]`, as for `per_example_gradient`. It is evaluated and never differentiated.
      num_examples: `S`, at least 1.
      num_directions: `q`, directions per example, at least 1.
      smoothing: `mu`, above 0, in units of `theta`.
      directions: "gaussian", "sphere", "rademacher" or "coordinate", see `zeroth_order`.
      antithetic: whether each direction is also evaluated with the opposite sign.
      resolution: dimensions of the subspace of the directions along each image side, see `zeroth_order`.
      basis: "tiles" or "dct", the basis of that subspace.
      opaque: whether `example_losses` is a function that JAX cannot trace, as for `zeroth_order`.

    Returns:
      An oracle `(theta, key, **sampling) -> Estimate` with the extra `spread`: the standard deviation of the estimates
      across examples, which shows how noisy their mean is. An answer costs `(q + 1) * S` queries, or `2 * q * S` if
      antithetic. The keywords are those of the oracle of `zeroth_order`.

    Raises:
      ValueError: as for `zeroth_order`.

    Examples:
      >>> targets = jnp.array([[0.0], [2.0]])  # two examples of one coordinate
      >>> oracle = per_example_zeroth_order(
      ...     lambda thetas: jnp.sum((thetas - targets) ** 2, axis=1),
      ...     num_examples=2, num_directions=1, directions="rademacher", antithetic=True,
      ... )
      >>> answer = oracle(jnp.array([3.0]), jax.random.key(0))
      >>> round(float(answer.grads[0]), 1), round(float(answer.extras["spread"][0]), 1), int(answer.queries)
      (4.0, 2.0, 4)
    """
    _check_directions(num_directions, smoothing, directions, resolution, basis)
    check_count("num_examples", num_examples, 1)
    batched_loss, scan = (
        (_probing.on_numpy(example_losses), _probing.eager_scan) if opaque else (example_losses, jax.lax.scan)
    )
    queries = _evaluations(num_directions, antithetic) * num_examples

    def oracle(theta, key, **sampling):
        flat, unflatten = flatten(theta)
        root = _covariance.root(theta, sampling, flat.dtype)
        subspace = Subspace.of(theta, resolution, basis)
        keys = jax.random.split(key, num_examples)
        seeds = [direction_seeds(directions, k, num_directions, subspace.size) for k in keys]

        def losses_at(points):
            return check_losses("example_losses", batched_loss(unflatten(points)), num_examples)

        at_theta = None if antithetic else losses_at(jnp.broadcast_to(flat, (num_examples, flat.size)))

        def step(total, seeds):
            us, points = _probing.probe(
                flat, seeds, smoothing, root, subspace, directions=directions, antithetic=antithetic
            )
            plus = losses_at(points[:num_examples])
            minus = losses_at(points[num_examples:]) if at_theta is None else at_theta
            slopes, values = ((plus - minus) / 2, (plus + minus) / 2) if antithetic else (plus - minus, minus)
            return total + slopes.astype(total.dtype)[:, None] / smoothing * us, values

        total, values = scan(step, jnp.zeros((num_examples, flat.size), flat.dtype), jnp.stack(seeds, axis=1))
        total = jax.vmap(subspace.project)(total * _probing.factor(directions, subspace, num_directions))
        total = _covariance.spread(total, root)
        moments = jnp.stack([jnp.mean(total, axis=0), safe_sqrt(jnp.var(total, axis=0))])
        grads, spread = (jax.tree.map(lambda x, row=row: x[row], unflatten(moments)) for row in (0, 1))
        return Estimate(jnp.mean(jnp.asarray(values)), grads, jnp.asarray(queries, jnp.int32), {"spread": spread})

    return oracle


@dataclasses.dataclass(frozen=True)
class ZerothOrder:
    """Settings of a zeroth-order oracle, for models that can only be evaluated.

    It is the `estimator` of `lft_jax.uap_family` and the `oracle` of `lft_jax.universal_perturbation`. Instances with
    equal settings are equal, so task families that differ only in the weights of their victim share a compilation.

    Attributes:
      num_directions: `q`, directions of one estimate (with `per_example`, of each example), at least 1.
      smoothing: `mu`, above 0, in units of `theta`; for perturbations, of the image range.
      directions: "gaussian", "sphere", "rademacher" or "coordinate", see `zeroth_order`.
      antithetic: whether each direction is also evaluated with the opposite sign.
      resolution: dimensions of the subspace of the directions along each image side; None for all dimensions.
      basis: "tiles" or "dct", the basis of that subspace.
      per_example: whether directions are independent for each example (`per_example_zeroth_order`).

    Examples:
      >>> estimator = ZerothOrder(num_directions=5)
      >>> oracle = estimator(lambda theta: jnp.sum(theta) * jnp.ones(3), num_examples=3)
      >>> answer = oracle(jnp.zeros(4), jax.random.key(0))
      >>> estimator.evaluations, int(answer.queries), answer.grads.shape
      (10, 30, (4,))
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
        """Queries per example that one answer costs."""
        return _evaluations(self.num_directions, self.antithetic)

    def __call__(self, example_losses: Callable[[PyTree], Any], *, num_examples: int, opaque: bool = False) -> Oracle:
        """The oracle of the mean of `example_losses`.

        Args:
          example_losses: `theta -> [S]`. It takes one `theta` for all examples, or with `per_example` one copy of
            `theta` for each, in a leading axis `[S]`.
          num_examples: `S`, at least 1.
          opaque: whether `example_losses` is a function that JAX cannot trace. It then receives NumPy arrays, and the
            oracle runs eagerly.

        Returns:
          An oracle, see `zeroth_order` and `per_example_zeroth_order`.

        Raises:
          ValueError: as for `zeroth_order`.
        """
        options: dict[str, Any] = {**dataclasses.asdict(self), "opaque": opaque}
        if options.pop("per_example"):
            return per_example_zeroth_order(example_losses, num_examples=num_examples, **options)

        def mean_loss(theta):
            return jnp.mean(jnp.asarray(example_losses(theta)))

        def mean_losses(thetas):  # opaque losses take a batch of points
            return jnp.stack([mean_loss(jax.tree.map(lambda x, i=i: x[i], thetas)) for i in range(_length(thetas))])

        return zeroth_order(mean_losses if opaque else mean_loss, evaluations=num_examples, **options)


def _length(batch):
    return len(jax.tree.leaves(batch)[0])


def zeroth_order_value_and_grad(
    loss_fn: Callable[[PyTree], Float[Array, ""]],
    *,
    num_directions: int = 20,
    smoothing: float = 1e-3,
    directions: str = "gaussian",
    antithetic: bool = False,
    resolution: int | None = None,
    basis: str = "tiles",
    chunk_size: int | None = None,
    memory_mib: float | None = None,
) -> Callable[[PyTree, PRNGKeyArray], tuple[Float[Array, ""], PyTree]]:
    """A finite-difference version of `jax.value_and_grad(loss_fn)`.

    Args:
      loss_fn: `theta -> []`, as for `zeroth_order`.
      num_directions: `q`, at least 1.
      smoothing: `mu`, above 0, in units of `theta`.
      directions: "gaussian", "sphere", "rademacher" or "coordinate", see `zeroth_order`.
      antithetic: whether each direction is also evaluated with the opposite sign.
      resolution: dimensions of the subspace of the directions along each image side, see `zeroth_order`.
      basis: "tiles" or "dct", the basis of that subspace.
      chunk_size: number of directions that are evaluated together; None for all.
      memory_mib: memory budget of a chunk in MiB, instead of `chunk_size`.

    Returns:
      A function `(theta, key) -> (value, grads)`: the loss `[]` (if antithetic, an estimate of it), and the estimate
      of the gradient, like `theta`.

    Raises:
      ValueError: as for `zeroth_order`.

    Examples:
      >>> value_and_grad = zeroth_order_value_and_grad(jnp.sum, num_directions=3, directions="coordinate")
      >>> value, grads = value_and_grad(jnp.array([1.0, 2.0, 3.0]), jax.random.key(0))
      >>> float(value), [round(float(g), 1) for g in grads]
      (6.0, [1.0, 1.0, 1.0])
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
    """Number of points at which one estimate evaluates the loss."""
    return 2 * num_directions if antithetic else num_directions + 1


def _check_directions(num_directions, smoothing, directions, resolution, basis):
    check_count("num_directions", num_directions, 1)
    check_positive("smoothing", smoothing)
    check_name("directions", directions, DRAW)
    check_name("basis", basis, BASES)
    if resolution is not None:
        check_count("resolution", resolution, 1)
        if directions == "coordinate":
            raise ValueError("resolution: directions='coordinate' are axes, which no subspace contains; leave it out.")
