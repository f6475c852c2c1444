"""Every element a kernel may touch, who wrote it and when: bounds, uninitialised reads and races are errors here.

Programs of a launch run one after another in the interpreter, but on a GPU in any order and at once. So an element
that one program wrote may be touched by another of the same launch only if the writer released it (an atomic with
release semantics) and the toucher acquired after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


class KernelFault(AssertionError):
    """A kernel touched memory it must not touch, or left out what it must write."""


@dataclass
class Region:
    """One tensor argument.

    Attributes:
        name: of the argument.
        base: address of its first element.
        item: bytes of an element.
        shape, strides: in elements; strides are not negative.
        writable: whether stores are allowed.
        written: [extent] elements that hold something, from before or from this kernel.
        writer, time: [extent] the last program of this launch that wrote an element, -1 for none, and when.
    """

    name: str
    base: int
    item: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool
    written: npt.NDArray[np.bool_]
    writer: npt.NDArray[np.int32]
    time: npt.NDArray[np.int64]

    @classmethod
    def of(cls, name: str, tensor: Any, holds: bool, writable: bool) -> Region:
        """``holds``: the tensor has its contents already."""
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        extent = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return cls(
            name,
            tensor.data_ptr(),
            tensor.element_size(),
            shape,
            strides,
            writable,
            np.full(extent, holds),
            np.full(extent, -1, np.int32),
            np.zeros(extent, np.int64),
        )

    def elements(self, addresses: npt.NDArray[np.uint64], item: int, where: str) -> npt.NDArray[np.int64]:
        """Element offsets of addresses; raises KernelFault for one outside the tensor."""
        if item != self.item:
            raise KernelFault(f"{where} {self.name}: {item}-byte elements of a tensor of {self.item}-byte ones")
        relative = addresses.astype(np.int64) - self.base
        offsets = relative // self.item
        bad = (relative % self.item != 0) | (offsets < 0) | (offsets >= len(self.written))
        if not bad.any():
            bad = ~self._inside(offsets)
        if bad.any():
            raise KernelFault(
                f"{where} {self.name}{list(self.shape)}: element {int(offsets[bad][0])} of {len(self.written)}, "
                f"{int(bad.sum())} of {bad.size} lanes are outside"
            )
        return offsets

    def _inside(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether offsets within the extent are elements: a row-padded tensor has gaps."""
        inside = np.ones(offsets.shape, bool)
        if len(self.written) == int(np.prod(self.shape)):
            return inside
        rest = offsets
        for stride, size in sorted(zip(self.strides, self.shape, strict=True), reverse=True):
            if stride:
                inside &= rest // stride < size
                rest = rest % stride
        result: npt.NDArray[np.bool_] = inside & (rest == 0)
        return result

    def missing(self) -> int:
        """Elements never written."""
        every = np.arange(len(self.written))
        return int((~self.written & self._inside(every)).sum())


@dataclass
class Guard:
    """The memory of one launch.

    Attributes:
        traffic: bytes that loads and stores asked for, atomics left out.
    """

    regions: dict[tuple[Any, ...], Region] = field(default_factory=dict)
    program: int = 0
    clock: int = 0
    traffic: int = 0
    released: dict[int, int] = field(default_factory=dict)
    acquired: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def _key(tensor: Any) -> tuple[Any, ...]:
        return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def add(self, name: str, tensor: Any, holds: bool, writable: bool) -> None:
        """Registers an argument."""
        key = self._key(tensor)
        if key not in self.regions or writable:
            self.regions[key] = Region.of(name, tensor, holds, writable)

    def region(self, tensor: Any) -> Region:
        """The region of an argument that was registered."""
        return self.regions[self._key(tensor)]

    def load(self, region: Region, addresses: npt.NDArray[np.uint64], item: int) -> None:
        """Checks the addresses of a load's live lanes."""
        offsets = region.elements(addresses, item, "load from")
        self.traffic += offsets.size * item
        unwritten = ~region.written[offsets]
        if unwritten.any():
            raise KernelFault(f"load from {region.name}: element {int(offsets[unwritten][0])} was never written")
        self._ordered(region, offsets, "read")

    def store(self, region: Region, addresses: npt.NDArray[np.uint64], item: int, atomic: bool = False) -> None:
        """Checks the addresses of a store's live lanes and notes them as written."""
        if not region.writable:
            raise KernelFault(f"store to {region.name}, which the launch does not list as written")
        offsets = region.elements(addresses, item, "store to")
        if not atomic:
            self.traffic += offsets.size * item
            if len(np.unique(offsets)) != offsets.size:
                raise KernelFault(f"store to {region.name}: two lanes write one element")
            self._ordered(region, offsets, "overwritten")
        region.written[offsets] = True
        region.writer[offsets] = self.program
        self.clock += 1
        region.time[offsets] = self.clock

    def fence(self, acquire: bool, release: bool) -> None:
        """An atomic of this program with these semantics."""
        self.clock += 1
        if release:
            self.released[self.program] = self.clock
        if acquire:
            self.acquired[self.program] = self.clock

    def _ordered(self, region: Region, offsets: npt.NDArray[np.int64], verb: str) -> None:
        writers = region.writer[offsets]
        foreign = (writers >= 0) & (writers != self.program)
        if not foreign.any():
            return
        acquired = self.acquired.get(self.program, -1)
        for writer in np.unique(writers[foreign]):
            released = self.released.get(int(writer), -1)
            mine = offsets[writers == writer]
            if released < int(region.time[mine].max()) or acquired < released:
                raise KernelFault(
                    f"{region.name}: element {int(mine[0])}, written by program {int(writer)}, is {verb} by program "
                    f"{self.program} of the same launch without a release and an acquire between them"
                )

    def finish(self, outputs: Sequence[Any]) -> None:
        """Raises KernelFault if an element of an output was not written."""
        for tensor in outputs:
            region = self.region(tensor)
            missing = region.missing()
            if missing:
                raise KernelFault(f"{region.name}{list(region.shape)}: {missing} elements were not written")
