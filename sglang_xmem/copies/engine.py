"""The GPU's copy engine, told of many pieces in one call.

It fills links that multiprocessors do not (docs/performance.md, Copies). It takes addresses from the CPU alone.
"""

from __future__ import annotations

import ctypes
from typing import Any

from sglang_xmem import gpus
from sglang_xmem.errors import CopyError, TierUnavailable

#: CUDA version of the driver function's arguments that are used here; later drivers have them too.
_SINCE = 12080


class CopyEngine:
    """cuMemcpyBatchAsync with arrays as they lie in memory; cuda-bindings would make objects and lists of them first.

    Raises:
        CopyError: the driver or cuda-bindings are older than CUDA 12.8.
    """

    def __init__(self) -> None:
        try:
            d = gpus.driver()
        except TierUnavailable as error:
            raise CopyError(f"No copy engine: {error}.") from None
        if not hasattr(d, "CUmemcpyAttributes"):
            raise CopyError("A batch of copies needs cuda-bindings 12.8 or newer.")
        status, address, found = d.cuGetProcAddress(b"cuMemcpyBatchAsync", _SINCE, 0)
        if status.value or not address:
            raise CopyError(f"A batch of copies needs a driver of CUDA 12.8 ({status.name}, {found.name}).")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        # targets, sources, sizes, count, attributes, each one's first piece, their number, which failed, stream
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer
        )
        self._call: Any = prototype(address)
        self._how = d.CUmemcpyAttributes()
        self._how.srcAccessOrder = d.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._first, self._failed = size(0), size(0)
        self._also = (self._how.getPtr(), ctypes.addressof(self._first), 1, ctypes.addressof(self._failed))
        self._status: Any = d.CUresult

    def copy(self, targets: int, sources: int, sizes: int, count: int, stream: int) -> None:
        """Enqueue pieces on a stream, in no order among themselves; never synchronizes.

        Args:
            targets, sources, sizes: addresses of arrays of `count` 8-byte words: each piece's addresses and bytes. They
                are read during the call.
            stream: a handle, not the legacy stream's.

        Raises:
            CopyError: the driver refuses.
        """
        status = self._call(targets, sources, sizes, count, *self._also, stream)
        if status:
            raise CopyError(f"The driver refuses a batch of copies: {self._status(status).name}.")
