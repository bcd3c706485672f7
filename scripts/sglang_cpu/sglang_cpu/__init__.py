"""SGLang 0.5.23 with HiCache on a machine without a GPU.

Everything here is off unless SGLANG_USE_CPU_ENGINE=1. Three parts:

- `imports` makes `sgl_kernel` and a CUDA build of torchvision importable; a .pth file installs it in every
  interpreter, because SGLang's child processes import both before they load plugins.
- `copies` holds torch versions of the host-device copies that stock HiCache takes from `sgl_kernel`.
- `plugin` puts these into SGLang through its plugin entry point.

The paged allocator needs nothing: SGLang's CPU platform says that Triton cannot launch, and the allocator then
takes its own torch functions.
"""
