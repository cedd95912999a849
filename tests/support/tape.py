"""A CUDA graph in software: what a function does, recorded once and replayed on what the same tensors hold then.

As a graph does, a tape keeps the places of tensors and every number that the host knew, and runs no Python again. What
a graph cannot record is an error here too: a number that is read from a tensor, a tensor that is made from numbers of
the host, a result whose shape depends on data. Kernels in Triton's interpreter are recorded by their launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from deltaserve.model.recording import Recording

REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "unique", "is_nonzero")
Work = Callable[[], None]


class NotRecordable(Exception):
    """A graph could not hold it."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []
        self.made: list[Tensor] = []  # results, which every replay writes again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in REFUSED:
            raise NotRecordable(f"{func} needs the host")
        if func.overloadpacket.__name__ == "index" and any(is_mask(index) for index in tree_leaves(args[1:])):
            raise NotRecordable(f"{func} by a mask: its shape depends on data")
        result = func(*args, **kwargs)
        given = {place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and place(leaf) not in given]
        if func._schema.is_mutable:
            self.work.append(lambda: func(*args, **kwargs))
        elif fresh:
            self.made += fresh
            self.work.append(lambda: rewrite(fresh, tree_leaves(func(*args, **kwargs))))
        return result

    def launch(self, executor: GridExecutor, args: Any, kwargs: Any) -> None:
        self.work.append(lambda: original(executor, *args, **kwargs))


original = GridExecutor.__call__


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def rewrite(old: list[Tensor], new: list[Any]) -> None:
    tensors = [leaf for leaf in new if isinstance(leaf, Tensor)]
    assert len(old) == len(tensors), "an operation with results of both kinds, views and others"
    for own, made in zip(old, tensors, strict=True):
        own.copy_(made)


def record(run: Callable[[], Tensor]) -> Recording:
    """As `model.recording.cuda_recorder()` does: runs once to warm up, once on record. A replay begins with NaN in all
    that it makes."""
    first = run().clone()
    recorder = _Recorder()
    with pytest.MonkeyPatch.context() as patch:

        def launched(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            recorder.launch(executor, args, kwargs)
            with torch.utils._python_dispatch._disable_current_modes():
                original(executor, *args, **kwargs)

        patch.setattr(GridExecutor, "__call__", launched)
        with recorder:
            output = run()

    def replay() -> None:
        for tensor in recorder.made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        for step in recorder.work:
            step()

    return Recording(first, output, replay)
