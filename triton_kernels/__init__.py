"""Triton kernels of kvkeye, one module per family. Imported as `kvkeye.triton_kernels`, under no other name.

A top-level `triton_kernels` would shadow an unrelated package that other programs import; hence the guard.
"""

if __name__ != "kvkeye.triton_kernels":
    raise ImportError(
        f"imported as {__name__!r}: this folder is the source of 'kvkeye.triton_kernels'. Import that name after "
        "`pip install -e .`; if another package named 'triton_kernels' was wanted, start Python outside this folder."
    )
