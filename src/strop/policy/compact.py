"""AdamW with less state: moments in 8 bits, and masters as a 16-bit weight with its rounding error beside it.

Bytes per trained value, without its gradient:

    | | fp32 moments | 8-bit moments |
    |---|---|---|
    | fp32 master (the parameter itself for adapters) | 8, and 4 for the copy of a 16-bit parameter | 2, and 4 |
    | compensated (16-bit parameters) | 8 and 2 | 2 and 2 |

Moments are kept blockwise (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861): 256
values share the largest of them as fp32, and each is the nearest of 256 numbers that lie dense for large values and
reach down seven decades for small ones. Of the second moment the root is kept: it is what divides, and it spans as many
decades as gradients do. As it is, it would span twice as many and be 0 where a gradient is below 1/4000 of its block's
largest, and a step there some hundred times the learning rate.

A compensated parameter p has c = master - p in its own dtype (Kahan 1965): together 16 bits of mantissa for bf16, so
that an update of 2^-15 of a weight still counts. No pinned memory is used and nothing leaves the device; a few thousand
values at a time are fp32.
"""

# The multi-tensor functions are torch's own and have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError

BLOCK = 256
PIECE = 1 << 22
"""Values that are unpacked at a time; at the peak of a step one takes 33 bytes, 132 MiB in all."""

Part = tuple[str, int, int]
"""(parameter, first value, end): values of a parameter, counted as if it were flat."""


def cut(sizes: Iterable[tuple[str, int]], most: int) -> list[list[Part]]:
    """Cut parameters of so many values into pieces of up to `most` values, in order."""
    pieces: list[list[Part]] = []
    free = 0
    for name, end in sizes:
        start = 0
        while start < end:
            if not free:
                pieces.append([])
                free = most
            stop = min(end, start + free)
            pieces[-1].append((name, start, stop))
            free -= stop - start
            start = stop
    return pieces


@functools.cache
def code(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the 256 numbers of the dynamic code in rising order, fp32, from -1 or 0 to 1.

    Decade 10^-e has its share of numbers at the middles of equal steps from a tenth of it to all of it; each decade has
    half as many as the one above.
    """
    positive: list[float] = []
    for decade in range(7):
        count = 2 ** (decade + (0 if signed else 1))
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        positive += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
    values = [*positive, *([-x for x in positive] if signed else []), 0.0, 1.0]
    assert len(values) == 256, f"{len(values)} numbers instead of 256"
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


@functools.cache
def _middles(signed: bool, device: torch.device) -> torch.Tensor:
    numbers = code(signed, device)
    return (numbers[:-1] + numbers[1:]) / 2


@dataclass(slots=True)
class Packed:
    """A vector in 8 bits; the last block may be shorter than 256."""

    codes: torch.Tensor
    """[n] uint8 into `code`."""
    largest: torch.Tensor
    """[blocks] fp32: the largest magnitude of each block."""
    signed: bool

    @classmethod
    def zeros(cls, n: int, signed: bool, device: torch.device) -> Packed:
        """Return n zeros."""
        zero = int((code(signed, device) == 0).nonzero())
        blocks = -(-n // BLOCK)
        codes = torch.full((n,), zero, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(blocks, device=device), signed)

    def unpack(self) -> torch.Tensor:
        """Return the vector, [n] fp32."""
        values = code(self.signed, self.codes.device)[self.codes.int()]
        return _blocks(values).mul_(self.largest[:, None]).flatten()[: len(values)]

    def pack(self, values: torch.Tensor) -> None:
        """Replace the vector by [n] fp32, each value rounded to the nearest number of its block.

        An unsigned value that is not 0 does not become 0: what is divided by it would have no bound.
        """
        rows = _blocks(values)
        torch.amax(rows.abs(), dim=1, out=self.largest)
        unit = rows / self.largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        index = torch.bucketize(unit, _middles(self.signed, values.device), out_int32=True)
        if not self.signed:
            index = torch.maximum(index, unit > 0)
        self.codes.copy_(index.flatten()[: len(values)])


def _blocks(values: torch.Tensor) -> torch.Tensor:
    missing = -len(values) % BLOCK
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.view(-1, BLOCK)


@dataclass(slots=True)
class _Piece:
    """Up to `PIECE` values of the parameters of one kind, and their state."""

    parts: list[Part]
    decay: float
    moments: tuple[Packed, Packed] | tuple[torch.Tensor, torch.Tensor]
    """The first, and the second: packed its root."""


class CompactAdamW:
    """AdamW in the interface of `MasterAdamW`."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        eight_bit: bool,
        compensated: bool,
    ) -> None:
        self._parameters = dict(parameters)
        self._betas, self._eps, self._eight_bit, self._compensated = betas, eps, eight_bit, compensated
        self._steps = 0
        self._beside: dict[str, torch.Tensor] = {}
        for name, p in self._parameters.items():
            if p.dtype != torch.float32:
                flat = p.detach().flatten()
                self._beside[name] = torch.zeros_like(flat) if compensated else flat.float()
        # Norms and biases are not decayed, as everywhere.
        kinds = (([(n, p.numel()) for n, p in self._parameters.items() if p.ndim >= 2], weight_decay),
                 ([(n, p.numel()) for n, p in self._parameters.items() if p.ndim < 2], 0.0))  # fmt: skip
        self._pieces = [self._piece(parts, decay) for sizes, decay in kinds for parts in cut(sizes, PIECE)]

    def _piece(self, parts: list[Part], decay: float) -> _Piece:
        n = sum(end - start for _, start, end in parts)
        device = self._parameters[parts[0][0]].device
        if self._eight_bit:
            return _Piece(parts, decay, (Packed.zeros(n, True, device), Packed.zeros(n, False, device)))
        return _Piece(parts, decay, (torch.zeros(n, device=device), torch.zeros(n, device=device)))

    def gradient_norm(self) -> float:
        """Return the 2-norm over all gradients, in fp32."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32) if grads else []
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    @torch.no_grad()
    def step(self, *, learning_rate: float, gradient_scale: float) -> None:
        """Scale the gradients, make one AdamW step and write the result into the parameters in place.

        A parameter without a gradient counts as one whose gradient is zero.
        """
        self._steps += 1
        for piece in self._pieces:
            self._step_piece(piece, learning_rate, gradient_scale)
        self.zero_grad()

    def _step_piece(self, piece: _Piece, learning_rate: float, gradient_scale: float) -> None:
        beta1, beta2 = self._betas
        grad = torch.cat([self._gradient(*part) for part in piece.parts]).mul_(gradient_scale)
        first, second = (m.unpack() if isinstance(m, Packed) else m for m in piece.moments)
        if self._eight_bit:
            second.square_()
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = second.sqrt()
        for packed, values in zip(piece.moments, (first, root), strict=True):
            if isinstance(packed, Packed):
                packed.pack(values)
        denominator = root.div_(math.sqrt(1 - beta2**self._steps)).add_(self._eps)
        master = torch.cat([self._master(*part) for part in piece.parts])
        master.mul_(1 - learning_rate * piece.decay)
        master.addcdiv_(first, denominator, value=-learning_rate / (1 - beta1**self._steps))
        at = 0
        for name, start, end in piece.parts:
            self._store(name, start, end, master[at : at + end - start])
            at += end - start

    def _gradient(self, name: str, start: int, end: int) -> torch.Tensor:
        p = self._parameters[name]
        if p.grad is None:
            return torch.zeros(end - start, device=p.device)
        return p.grad.flatten()[start:end].float()

    def _master(self, name: str, start: int, end: int) -> torch.Tensor:
        values = self._parameters[name].detach().view(-1)[start:end]
        beside = self._beside.get(name)
        if beside is None:
            return values
        return values.float().add_(beside[start:end]) if self._compensated else beside[start:end]

    def _store(self, name: str, start: int, end: int, master: torch.Tensor) -> None:
        target = self._parameters[name].detach().view(-1)[start:end]
        target.copy_(master)
        beside = self._beside.get(name)
        if beside is not None:
            beside[start:end].copy_(master - target if self._compensated else master)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self._parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that a resumed run needs: parameters, what stands beside them, packed moments, step count.

        What is packed of the second moment is named for what it is: `exp_avg_sq_root`.
        """
        state = {f"parameter.{name}": p.detach() for name, p in self._parameters.items()}
        state |= {f"beside.{name}": value for name, value in self._beside.items()}
        for i, piece in enumerate(self._pieces):
            second = "exp_avg_sq_root" if self._eight_bit else "exp_avg_sq"
            for kind, moment in zip(("exp_avg", second), piece.moments, strict=True):
                if isinstance(moment, Packed):
                    state[f"{kind}.codes.{i}"], state[f"{kind}.largest.{i}"] = moment.codes, moment.largest
                else:
                    state[f"{kind}.{i}"] = moment
        return state | {"steps": torch.tensor(self._steps)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, into the same storage.

        Raises CheckpointError for 8-bit moments of a version that coded them otherwise.
        """
        own = self.state_dict()
        if "exp_avg_sq.codes.0" in state:
            raise CheckpointError(
                "the checkpoint's 8-bit moments are those of an earlier version, whose coding made steps far too large",
                hint="start again with --out ANOTHER_FOLDER, and from these weights: lora.init_from: the checkpoint's "
                "folder, or with lora.r: 0 model.path: that folder",
            )
        for name, target in own.items():
            if name != "steps":
                target.copy_(state[name])
        self._steps = int(state["steps"])
