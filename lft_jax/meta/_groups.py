"""Families that share a structure and shapes, stacked, so that one program computes them one after the other."""

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_pytree_node_class
class Group:
    """Families of one structure and shapes. Leaves that are the same array in all are stored once, others stacked."""

    def __init__(self, shared, stacked, structure, size):
        self.shared, self.stacked, self.structure, self.size = shared, stacked, structure, size

    def member(self, stacked):
        leaves = [s if s is not None else own for s, own in zip(self.shared, stacked, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def first(self):
        return self.member([None if column is None else column[0] for column in self.stacked])

    def tree_flatten(self):
        return (self.shared, self.stacked), (self.structure, self.size)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        return cls(*arrays, *static)


def group_families(families):
    """Groups families that can be stacked; `order[i]` is the index of family i among the members of all groups."""
    members = {}
    for index, family in enumerate(families):
        leaves, structure = jax.tree.flatten(family)
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        members.setdefault((structure, shapes), []).append((index, leaves))
    groups, places = [], []
    for (structure, _), group in members.items():
        columns = list(zip(*(leaves for _, leaves in group), strict=True))
        same = [all(leaf is column[0] for leaf in column) for column in columns]
        shared = [column[0] if s else None for column, s in zip(columns, same, strict=True)]
        stacked = [None if s else jnp.stack(column) for column, s in zip(columns, same, strict=True)]
        groups.append(Group(shared, stacked, structure, len(group)))
        places += [index for index, _ in group]
    return groups, np.argsort(places)
