"""The number format of a machine."""

from pathlib import Path

import pytest

from eagle_rpc.config.compose import load
from eagle_rpc.config.native import native_dtype


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ("flags : fma avx2", "null", "float32"),
        ("flags : fma avx512f avx512_bf16", "null", "bfloat16"),
        ("Features : asimd bf16 i8mm", "null", "bfloat16"),
        ("flags : fma avx2", "nvidia0", "bfloat16"),
        (None, "null", "float32"),
    ],
)
def test_a_machine_without_instructions_for_bfloat16_computes_in_float32(
    tmp_path: Path, flags: str | None, device: str, expected: str
):
    for name in ("dev", "proc"):
        (tmp_path / name).mkdir()
    (tmp_path / "dev" / device).touch()
    if flags is not None:
        (tmp_path / "proc" / "cpuinfo").write_text(flags + "\n")
    assert native_dtype(tmp_path) == expected


def test_the_embedded_run_computes_in_the_format_of_this_machine():
    config = load("experiment=smollm2")
    chosen = (config.target.dtype, config.regenerate.dtype, config.train.autocast)
    assert {dtype and dtype.value for dtype in chosen} == {native_dtype()}
