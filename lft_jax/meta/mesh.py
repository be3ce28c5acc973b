"""Devices that share the tasks of a meta-step."""

import jax
import numpy as np

#: Name of the mesh axis that tasks are split over.
TASK_AXIS = "task"


def task_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """Returns a mesh with one axis, `task`, for the `mesh` of `meta_trainer`.

    Args:
      num_devices: number of devices, counted over all hosts. None for all.

    Raises:
      ValueError: if there are fewer devices.

    Examples:
      >>> dict(task_mesh(1).shape)
      {'task': 1}
    """
    devices = jax.devices()
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices must be from 1 to {len(devices)}, the devices available, got {num_devices!r}.")
    return jax.sharding.Mesh(np.asarray(devices[:num_devices]), (TASK_AXIS,))


def share_tasks(gradient, mesh, tasks_per_family):
    """`gradient`, with the tasks of each family (the last axis of `keys`) split over the mesh."""
    if mesh.axis_names != (TASK_AXIS,) or tasks_per_family % mesh.size:
        raise ValueError(
            f"mesh must have one axis, {TASK_AXIS!r}, whose size divides tasks_per_family = {tasks_per_family}, got "
            f"{dict(mesh.shape)}."
        )
    everywhere, by_task = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, TASK_AXIS)
    specs = (everywhere, everywhere, everywhere, by_task, everywhere, everywhere)

    def on_each_device(*inputs):
        return jax.lax.pmean(gradient(*inputs), TASK_AXIS)

    # check_vma=False: with it, `grad` would already sum over devices what is averaged here.
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
