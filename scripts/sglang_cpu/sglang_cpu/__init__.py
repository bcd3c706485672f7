"""SGLang 0.5.23 with HiCache on a machine without a GPU, for models of all pool kinds that its CPU engine can run.

Everything here is off unless SGLANG_USE_CPU_ENGINE=1. The parts:

- `imports` makes `sgl_kernel` and a CUDA build of torchvision importable; a .pth file installs it in every
  interpreter, because SGLang's child processes import both before they load plugins.
- `speculative` and `linear_attention` hold torch versions of functions that SGLang takes from `sgl_kernel` on a CPU:
  for speculative decoding, and for Qwen3-Next's linear attention. `imports` gives them out under their own names.
- `models` makes up for what SGLang's torch attention and Qwen3-Next have for accelerators alone.
- `allocator` holds what the paged allocator of 0.5.21 has Triton kernels for.
- `copies` holds torch versions of the host-device copies of stock HiCache.
- `plugin` puts these into SGLang through its plugin entry point.

Nothing has to be switched on for a model: each stand-in acts where a model calls it.

Versions 0.5.21 and 0.5.22 run too: what a version does not have is not replaced.
"""
