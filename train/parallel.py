"""Training under torchrun: the ranks share the rows of each batch, or the latents of the dictionary (train.shards).

What all ranks must agree on goes through here: sums over their rows, what the first of them decides, when to stop.
One process alone is one rank.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from shared.errors import ConfigError, TrainingError

T = TypeVar("T")
Over = Literal["rows", "latents"]

PATIENCE = timedelta(hours=6)  # the first rank measures and reports alone, while the others wait


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the ranks that torchrun started, where it did; over NCCL on GPUs, each rank on its own, else over Gloo.

    Raises TrainingError where another rank has ended meanwhile.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:  # of Gloo in words alone
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        way_out = "Its own message says why; then train resume"
        raise TrainingError("another rank has ended", str(error).partition("\n")[0], way_out) from error
    finally:
        dist.destroy_process_group()


_over: list[Over] = ["rows"]


@contextmanager
def over(what: Over) -> Iterator[None]:
    """What the ranks share meanwhile."""
    _over.append(what)
    try:
        yield
    finally:
        _over.pop()


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def row_ranks() -> int:
    """The ranks that share the rows of a batch."""
    return ranks() if _over[-1] == "rows" else 1


def latent_ranks() -> int:
    """The ranks that share the latents of the dictionary."""
    return ranks() if _over[-1] == "latents" else 1


def local() -> int:
    """The ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks())) if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def row_rank() -> int:
    """Which of the ranks that share rows this is."""
    return rank() if row_ranks() > 1 else 0


def share(batch: int) -> int:
    """The rows of a batch that each rank takes. Raises ConfigError where they are not equal."""
    if batch % row_ranks():
        value = f"{batch:,} rows over {row_ranks()} ranks"
        raise ConfigError("the batch cannot be shared evenly", value, "Change batch")
    return batch // row_ranks()


def summed(parts: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over the ranks that share rows; all in one message, in fp64."""
    return list(parts) if row_ranks() == 1 else _summed(parts)


def summed_over_latents(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same over the ranks that share latents."""
    return list(parts) if latent_ranks() == 1 else _summed(parts)


def summed_over_ranks(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same over all ranks, whatever they share."""
    return list(parts) if ranks() == 1 else _summed(parts)


def _summed(parts: Sequence[Tensor]) -> list[Tensor]:
    flat = torch.cat([part.detach().double().flatten() for part in parts])
    dist.all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]


def average(parameters: Sequence[Tensor]) -> None:
    """Replace each parameter's gradient by its mean over the ranks, whose batches have equally many rows."""
    if ranks() == 1:
        return
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    for handle in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        handle.wait()
    for one, gradient in zip(parameters, gradients, strict=True):
        one.grad = gradient.div_(ranks())


def least(value: Tensor) -> Tensor:
    """The least over the ranks."""
    if ranks() > 1:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def gathered(values_n: Tensor) -> list[Tensor]:
    """These values of every rank, which has as many."""
    if ranks() == 1:
        return [values_n]
    found = [torch.empty_like(values_n) for _ in range(ranks())]
    dist.all_gather(found, values_n.contiguous())
    return found


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on some rank: all ranks then do alike. Waits for the device where there are several."""
    return flag if ranks() == 1 else not bool(least(torch.tensor(0 if flag else 1, device=device)))


def first(do: Callable[[], T]) -> T:
    """What `do` gives on the first rank, which alone calls it; on every rank. Raises there what it raises."""
    if ranks() == 1:
        return do()
    told: list[T | Exception | None] = [None, None]
    if rank() == 0:
        try:
            told[0] = do()
        except Exception as error:
            dist.broadcast_object_list([None, error], src=0)  # else the others would wait for ever
            raise
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[1], Exception):
        raise told[1]
    return cast(T, told[0])
