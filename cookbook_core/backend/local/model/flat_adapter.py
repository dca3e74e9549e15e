"""One LoRA adapter: its tensors in one, its accumulated gradient, its optimizer.

An adapter has hundreds of small tensors. Here they are views of one flat tensor `(P,)`, as are
their gradients and Adam's moments, so that a step, a copy or a transfer is one kernel instead of
hundreds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.errors import RequestError
from cookbook_core.types import AdamParams

import torch

ALIGNED = 64
"""Each view starts at a multiple of this many elements, as kernels expect of whole tensors; the
elements between two views are padding."""


@dataclass
class Slot:
    """The LoRA layers of one configuration, into which one adapter at a time is put.

    Attributes:
        name: peft's name of it in the model.
        config: a peft.LoraConfig.
        params: the layers' parameters by the key under which peft saves them.
        rounded: `(P,)`, the active adapter in the dtype of a base below float32; None for others.
        holder: number of the adapter that was active last.
    """

    name: str
    config: Any
    params: dict[str, torch.nn.Parameter]
    rounded: torch.Tensor | None = field(default=None, repr=False)
    holder: int | None = None

    def __post_init__(self) -> None:
        self._size, self._pieces = 0, []
        """Length of a flat tensor; the shape, strides and start of each view."""
        for p in self.params.values():
            strides = torch.empty(p.shape, device="meta").stride()
            self._pieces.append((p.shape, strides, self._size))
            self._size += math.ceil(p.numel() / ALIGNED) * ALIGNED

    def new_flat(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Zeros `(P,)` for one adapter: on the layers' device, in their dtype by default."""
        like = next(iter(self.params.values()))
        return torch.zeros(self._size, dtype=dtype or like.dtype, device=like.device)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the views of `flat` `(P,)` in the order and shapes of the parameters."""
        return [flat.as_strided(*piece) for piece in self._pieces]

    def norm(self, flat: torch.Tensor) -> torch.Tensor:
        """L2 norm of the views of `flat`, summed tensor by tensor; 0-d."""
        return torch.nn.utils.get_total_norm(self.views(flat))


class Adapter:
    """One LoRA adapter in a slot.

    Args:
        slot: the layers it belongs to.
        flat: `(P,)`, its values in the slot's layout; used, not copied.
    Attributes:
        flat: the same, as the one parameter of the optimizer.
        params: views of it, A `(r, in)` and B `(out, r)`, in the order of `slot.params`.
        grad: `(P,)`, the accumulated gradient; None after a step.
        step: optimizer steps taken.
        optimizer: None until it is needed.
        number: identifies the adapter among the processes of a run.
    """

    _numbers = itertools.count()

    def __init__(self, slot: Slot, flat: torch.Tensor) -> None:
        self.slot = slot
        self.flat = torch.nn.Parameter(flat)
        self.params = [torch.nn.Parameter(view) for view in slot.views(flat)]
        self.grad: torch.Tensor | None = None
        self.step = 0
        self.optimizer: torch.optim.AdamW | None = None
        self.number = next(self._numbers)

    @property
    def grads(self) -> list[torch.Tensor] | None:
        """The accumulated gradient, one tensor per parameter. Assign None to drop it."""
        return None if self.grad is None else self.slot.views(self.grad)

    @grads.setter
    def grads(self, value: None) -> None:
        self.grad = value

    def named(self) -> dict[str, torch.Tensor]:
        """Return the detached parameters by peft's key: A `(r, in)`, B `(out, r)`."""
        return {k: p.detach() for k, p in zip(self.slot.params, self.params, strict=True)}

    def copy(self) -> Adapter:
        """A new adapter with the same weights, no gradient, no optimizer and step 0."""
        return Adapter(self.slot, self.flat.detach().clone())

    @torch.no_grad()
    def accumulate(self, grads: Sequence[torch.Tensor]) -> None:
        """Add a gradient to the accumulated one.

        Args:
            grads: one tensor per parameter, A `(r, in)`, B `(out, r)`.

        Raises:
            RequestError: the sum is not finite; the accumulated gradient is unchanged.
        """
        total = torch.zeros_like(self.flat) if self.grad is None else self.grad.clone()
        add = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
        add(self.slot.views(total), list(grads))
        norm = float(self.slot.norm(total))
        if not math.isfinite(norm):
            raise RequestError(
                "forward_backward",
                "the gradient of the parameters is not finite",
                expected="a finite gradient",
                got=f"norm {norm}",
                fix="Nothing was accumulated. Scale the loss down, or load the model in float32.",
            )
        self.grad = total

    @torch.no_grad()
    def optim_step(self, adam: AdamParams) -> dict[str, float]:
        """Take one AdamW step on the accumulated gradient, then clear the gradient.

        Returns:
            grad_norm: L2, before clipping. update_norm: L2 of the change of the weights. lr.
        Raises:
            RequestError: no gradient was accumulated, or the step is not finite in their dtype;
                weights, moments and gradient are unchanged.
        """
        if self.grad is None:
            raise RequestError(
                "optim_step",
                "no gradient has been accumulated since the last step",
                fix="Call forward_backward() or forward_backward_custom() first.",
            )
        optimizer = self.ready_optimizer()
        state = {p: {k: x.clone() for k, x in s.items()} for p, s in optimizer.state.items()}
        for group in optimizer.param_groups:
            group.update(
                lr=adam.learning_rate,
                betas=(adam.beta1, adam.beta2),
                eps=adam.eps,
                weight_decay=adam.weight_decay,
            )
        before = self.flat.clone()
        grad_norm = self.slot.norm(self.grad)
        shrink = torch.clamp((adam.grad_clip_norm or math.inf) / (grad_norm + 1e-6), max=1.0)
        self.flat.grad = self.grad * shrink
        optimizer.step()
        self.flat.grad = None
        update_norm = self.slot.norm(self.flat - before)
        norms = torch.stack([grad_norm, update_norm]).tolist()
        if not math.isfinite(norms[1]):
            self.flat.copy_(before)
            optimizer.state.clear()
            optimizer.state.update(state)
            raise RequestError(
                "optim_step",
                "the step leaves the range of the weights",
                expected="a finite update",
                got=f"norm {norms[1]} with {adam}",
                fix="Nothing was changed. Lower learning_rate, raise eps, or clip the gradient.",
            )
        self.grad = None
        self.step += 1
        return {"grad_norm": norms[0], "update_norm": norms[1], "lr": adam.learning_rate}

    def ready_optimizer(self) -> torch.optim.AdamW:
        """The optimizer, made on first use: snapshots and references never need one."""
        if self.optimizer is None:
            fused = self.flat.device.type in ("cpu", "cuda")
            self.optimizer = torch.optim.AdamW([self.flat], fused=fused)
        return self.optimizer
