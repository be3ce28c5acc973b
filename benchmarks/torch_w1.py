"""W1 in PyTorch: tasks merged into one batch; query losses after each step, or all at the end (two-phase)."""

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import w1


class LeNet(nn.Module):
    """The LeNet of `lft_jax.victims.models`, for images `[N, 1, H, W]`."""

    def __init__(self, variables, dtype):
        super().__init__()
        self.weights = nn.ParameterList()
        params = jax.tree.map(np.asarray, variables["params"])
        for name in ("Conv_0", "Conv_1"):
            self._keep(params[name]["kernel"].transpose(3, 2, 0, 1), dtype)
            self._keep(params[name]["bias"], dtype)
        side = int((len(params["Dense_0"]["kernel"]) // 32) ** 0.5)
        flat = (
            params["Dense_0"]["kernel"].reshape(side, side, 32, -1).transpose(3, 2, 0, 1)
        )  # PyTorch has channels first
        self._keep(flat.reshape(len(flat), -1), dtype)
        self._keep(params["Dense_0"]["bias"], dtype)
        self._keep(params["Dense_1"]["kernel"].T, dtype)
        self._keep(params["Dense_1"]["bias"], dtype)

    def _keep(self, array, dtype):
        tensor = torch.tensor(np.ascontiguousarray(array), dtype=dtype)
        self.weights.append(nn.Parameter(tensor, requires_grad=False))

    def forward(self, images):
        c0, b0, c1, b1, d0, e0, d1, e1 = self.weights
        x = 4 * images - 2
        for kernel, bias in ((c0, b0), (c1, b1)):
            x = functional.relu(functional.max_pool2d(functional.conv2d(x, kernel, bias, padding=2), 2))
        x = functional.relu(functional.linear(x.flatten(1), d0, e0))
        return functional.linear(x, d1, e1)


class Rule(nn.Module):
    """The coordinatewise LSTM with LogAndSign features, with the weights of the library's rule."""

    def __init__(self, params, hidden, dtype):
        super().__init__()
        self.cells = nn.ModuleList()
        for cell in jax.tree.map(np.asarray, params["cells"]):
            own = nn.LSTMCell(cell["weight"].shape[1] - hidden, hidden, dtype=dtype)
            order = np.concatenate([np.arange(4 * hidden).reshape(4, hidden)[i] for i in (0, 1, 3, 2)])  # i, f, g, o
            inputs = cell["weight"].shape[1] - hidden
            with torch.no_grad():
                own.weight_ih.copy_(torch.tensor(cell["weight"][order, :inputs]))
                own.weight_hh.copy_(torch.tensor(cell["weight"][order, inputs:]))
                own.bias_ih.copy_(torch.tensor(cell["bias"][order]))
                own.bias_hh.zero_()
            self.cells.append(own)
        self.head = nn.Linear(hidden, 1, dtype=dtype)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(np.asarray(params["head"]["weight"])))
            self.head.bias.copy_(torch.tensor(np.asarray(params["head"]["bias"])))

    def forward(self, grad, states):
        """Maps `grad` `[n]` to the step to subtract `[n]` and the states of the cells."""
        small = float(np.exp(-10.0))
        magnitude = torch.log(grad.abs().clamp(min=small)) / 10
        x, new = torch.stack([magnitude, (grad / small).clamp(-1, 1)], -1), []
        for cell, state in zip(self.cells, states, strict=True):
            x, memory = cell(x, state)
            new.append((x, memory))
        return 0.1 * self.head(x)[:, 0], new


def _hinge(logits, labels):
    own = logits.gather(1, labels[:, None])[:, 0]
    other = logits.masked_fill(functional.one_hot(labels, logits.shape[1]).bool(), -torch.inf).amax(1)
    return (own - other).clamp(min=-w1.KAPPA)


def meta_loss(work, victim, rule, support, query, *, two_phase):
    """Query loss, summed over steps, mean over tasks. Batches: images `[T, 10, 1, H, W]`, labels `[T, 10]`."""
    tasks, count = support[1].shape

    def losses(thetas, batch):
        """Sum of the losses of `thetas` `[B, T, 1, H, W]`."""
        images = batch[0][None] + thetas[:, :, None]
        images = images.clamp(0, 1) if work.clip else images
        labels = batch[1][None].expand(len(thetas), -1, -1).reshape(-1)
        return _hinge(victim(images.flatten(0, 2)), labels).sum() / count

    dtype = support[0].dtype
    theta = torch.zeros(tasks, 1, work.side, work.side, dtype=dtype)
    zeros = torch.zeros(theta.numel(), work.hidden, dtype=dtype)
    states, total, thetas = [(zeros, zeros)] * work.layers, 0, []
    for _ in range(work.num_steps):
        at = theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(losses(at[None], support), at)
        step, states = rule(grad.flatten(), states)
        theta = (theta - step.view_as(theta)).clamp(-w1.EPSILON, w1.EPSILON)
        if two_phase:
            thetas.append(theta)
        else:
            total = total + losses(theta[None], query)
    if two_phase:
        total = losses(torch.stack(thetas), query)
    return total / tasks


def batches(episodes, dtype):
    """The library's episodes `[T]` as pairs (images, labels), of support and query sets."""
    return [
        (
            torch.tensor(np.asarray(batch.images).transpose(0, 1, 4, 2, 3), dtype=dtype),
            torch.tensor(np.asarray(batch.labels), dtype=torch.long),
        )
        for batch in episodes
    ]


def meta_step(work, variables, params, episodes, *, two_phase):
    """A function that makes one meta-step. The tasks are sampled beforehand, outside the timing."""
    victim, rule = LeNet(variables, torch.float32), Rule(params, work.hidden, torch.float32)
    support, query = batches(episodes, torch.float32)
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)

    def run():
        optimizer.zero_grad()
        meta_loss(work, victim, rule, support, query, two_phase=two_phase).backward()
        optimizer.step()

    return run


def loss_and_head_gradient(work, variables, params, episodes, *, two_phase):
    """The meta-loss and its gradient with respect to the weights of the head, in float64."""
    victim, rule = LeNet(variables, torch.float64), Rule(params, work.hidden, torch.float64)
    loss = meta_loss(work, victim, rule, *batches(episodes, torch.float64), two_phase=two_phase)
    loss.backward()
    return loss.item(), rule.head.weight.grad.numpy()


def versions():
    """Version of PyTorch and its default number of threads."""
    return {"version": torch.__version__, "threads": torch.get_num_threads()}
