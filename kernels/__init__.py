"""Sources of the copy kernels. In the repository they are in `kernels/`; installed they are `sglang_xmem.kernels`.

`page_copy.cu` is CUDA C++, compiled on the user's machine by NVRTC (`sglang_xmem.copies.nvrtc`), so it ships as text;
`page_copy_triton.py` is the same contract in Triton.
"""

from __future__ import annotations

from importlib import resources


def source(name: str) -> str:
    """Read a kernel source of this folder, such as "page_copy.cu".

    Raises:
        FileNotFoundError: there is no such file.
    """
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
