"""A slab of GPU memory from mtierd, passed as a descriptor and mapped for this process. Imports no CUDA bindings."""

from __future__ import annotations

import ctypes
from typing import Any

from sglang_xmem.errors import Unavailable


class GpuMapping:
    """GPU memory mapped at addresses of this process that the CPU cannot access.

    Args:
        library: libpages.so.
        fd: the slab's descriptor; the caller closes it.
        nbytes: size of the slab.
        granularity: alignment of its address, in bytes.

    Attributes:
        owner: None; no view of the memory keeps it mapped.

    Raises:
        Unavailable: the calling thread has no CUDA context, or its GPU cannot access the memory.
    """

    owner: Any = None

    def __init__(self, library: Any, fd: int, nbytes: int, granularity: int) -> None:
        why = ctypes.create_string_buffer(512)
        self._library = library
        self._mapping: int | None = library.pages_map_gpu(fd, nbytes, granularity, why)
        if not self._mapping:
            raise Unavailable(f"the bank's memory cannot be mapped: {why.value.decode(errors='replace')}")
        self.nbytes = nbytes
        self.address = int(library.pages_address(self._mapping))

    def close(self) -> None:
        """Wait for the context of the mapping, and unmap; idempotent."""
        mapping, self._mapping = self._mapping, None
        if mapping:
            self._library.pages_unmap_gpu(mapping)
