"""Runs a command as on an older kernel: `python old_kernel.py SYSCALL[:OPTION],... COMMAND...` makes calls fail.

SYSCALL is a number; OPTION the third argument that is refused, any where it is left out. x86-64.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_ALLOW, _NO_SUCH_CALL = 0x7FFF0000, 0x00050000 | 38
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def refuse(calls: list[tuple[int, int | None]]) -> None:
    """Make system calls of this process and its children fail with ENOSYS: by number, and third argument if given."""
    program = b""
    for number, option in calls:
        program += _instruction(_LOAD, 0)  # the number
        if option is None:
            program += _instruction(_JUMP_IF_EQUAL, number, 0, 1)
        else:
            program += _instruction(_JUMP_IF_EQUAL, number, 0, 3)
            program += _instruction(_LOAD, 16 + 2 * 8)  # the third argument's lower half
            program += _instruction(_JUMP_IF_EQUAL, option, 0, 1)
        program += _instruction(_RETURN, _NO_SUCH_CALL)
    program += _instruction(_RETURN, _ALLOW)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code)), 16)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SECCOMP, _FILTER, ctypes.addressof(header), 0, 0)):
        if libc.prctl(*(ctypes.c_ulong(argument) for argument in arguments)) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    pairs = (text.partition(":") for text in sys.argv[1].split(","))
    refuse([(int(number), int(option) if option else None) for number, _, option in pairs])
    os.execv(sys.argv[2], sys.argv[2:])
