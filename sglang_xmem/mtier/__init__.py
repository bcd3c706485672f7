"""A service that owns banks of memory (`mtierd`) and the client library of X-Mem's C interface for it (`libmtier.so`).

The C++ sources are in native/ and are compiled on the user's machine (see `build`).
"""
