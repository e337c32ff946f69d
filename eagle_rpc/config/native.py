"""The number format that this machine computes fast, found without loading PyTorch."""

from pathlib import Path

# What Linux calls the instructions for bfloat16 on x86 and ARM.
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


def native_dtype(root: Path = Path("/")) -> str:
    """`bfloat16` with an NVIDIA GPU or a processor that has instructions for it, else `float32`.

    Other processors take several times as long for bfloat16 as for float32.
    """
    if any(root.glob("dev/nvidia[0-9]*")):
        return "bfloat16"
    try:
        words = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return "float32"
    return "float32" if _INSTRUCTIONS.isdisjoint(words) else "bfloat16"
