"""HiCache's L2 pool in faster or larger memory, for stock SGLang.

Importing this package needs neither a GPU nor SGLang; SGLang finds it through its plugin entry point
(`sglang_xmem.plugin:register`), and `--hicache-use-xmem` turns it on.
"""

__version__ = "0.1.0"
