"""The large matrix products of the fused step, in the compute dtype or in fp8.

In fp8 both factors of a product are rounded to one scale each, found anew for every tensor: values to
float8_e4m3fn, gradients to float8_e5m2, whose range is wider. Sums and results are as in the compute dtype;
weight gradients are summed in fp32.
Legend: N slots, O and I output and input width of a weight.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eagle_rpc.draft.fused import formulas

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
# Both widths of a weight have to be multiples of it: the rule of scaled products.
MULTIPLE = 16


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has scaled products of fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Products:
    """Products in the dtype of their factors."""

    def refresh(self) -> None:
        """Called when the weights have changed."""

    def forward(
        self, x_NI: Tensor, weight_OI: Tensor, *, plus_NO: Tensor | None = None, out_NO: Tensor | None = None
    ) -> Tensor:
        """`x @ weight.T`, with `plus` added, in `out` if it is given."""
        if plus_NO is None:
            return torch.mm(x_NI, weight_OI.t(), out=out_NO)
        return torch.addmm(plus_NO, x_NI, weight_OI.t(), out=out_NO)

    def input_gradient(self, grads_NO: Tensor, weight_OI: Tensor) -> Tensor:
        """`grads @ weight`."""
        return grads_NO @ weight_OI

    def add_weight_gradients(self, parts: Iterable[tuple[Tensor, Tensor]], inputs_NI: Tensor) -> None:
        """`gradient += grads.T @ inputs` for each part (`gradient` [O, I], `grads` [N, O]).

        Added in the gradient's dtype without rounding in between.
        """
        for gradient_OI, grads_NO in parts:
            if gradient_OI.dtype == inputs_NI.dtype:
                gradient_OI.addmm_(grads_NO.t(), inputs_NI)
            else:
                wide = gradient_OI.dtype
                torch.addmm(gradient_OI, grads_NO.t(), inputs_NI, out_dtype=wide, out=gradient_OI)


class Fp8Products(Products):
    """Products of the given weights in fp8; those of other weights, or without slots, as `Products`.

    A CPU multiplies the rounded factors in the compute dtype.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """`weights` [O, I] each, in the compute dtype; the ones with odd widths are left out."""
        self._weights = [weight for weight in weights if not any(size % MULTIPLE for size in weight.shape)]
        # By weight: for the forward pass [O, I], for input gradients [I, O], and the scale of both.
        self._rounded: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    def refresh(self) -> None:
        for weight in self._weights:
            straight_OI, scale = formulas.to_fp8(weight, VALUES, False)
            turned_IO, _ = formulas.to_fp8(weight, VALUES, True)
            self._rounded[weight] = straight_OI, turned_IO, scale

    def forward(
        self, x_NI: Tensor, weight_OI: Tensor, *, plus_NO: Tensor | None = None, out_NO: Tensor | None = None
    ) -> Tensor:
        if weight_OI not in self._rounded or not len(x_NI):
            return super().forward(x_NI, weight_OI, plus_NO=plus_NO, out_NO=out_NO)
        straight_OI, _, scale = self._rounded[weight_OI]
        product_NO = _scaled(formulas.to_fp8(x_NI, VALUES, False), (straight_OI, scale), x_NI.dtype)
        if plus_NO is not None:
            return torch.add(plus_NO, product_NO, out=out_NO)
        return product_NO if out_NO is None else out_NO.copy_(product_NO)

    def input_gradient(self, grads_NO: Tensor, weight_OI: Tensor) -> Tensor:
        if weight_OI not in self._rounded or not len(grads_NO):
            return super().input_gradient(grads_NO, weight_OI)
        _, turned_IO, scale = self._rounded[weight_OI]
        return _scaled(formulas.to_fp8(grads_NO, GRADIENTS, False), (turned_IO, scale), grads_NO.dtype)

    def add_weight_gradients(self, parts: Iterable[tuple[Tensor, Tensor]], inputs_NI: Tensor) -> None:
        parts = list(parts)
        if not len(inputs_NI) or any(size % MULTIPLE for gradient, _ in parts for size in gradient.shape):
            super().add_weight_gradients(parts, inputs_NI)
            return
        inputs = formulas.to_fp8(inputs_NI, VALUES, True)
        for gradient_OI, grads_NO in parts:
            grads = formulas.to_fp8(grads_NO, GRADIENTS, True)
            # Sums over tens of thousands of slots need the precise accumulation.
            gradient_OI.add_(_scaled(grads, inputs, gradient_OI.dtype, fast=False))


def _scaled(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], dtype: torch.dtype, *, fast: bool = True
) -> Tensor:
    """`left @ right.T` of two fp8 matrices with their scales; `fast` accumulates in less than fp32."""
    (rows, row_scale), (columns, column_scale) = left, right
    if not rows.is_cuda:
        return ((rows.to(dtype) @ columns.to(dtype).t()) * (row_scale * column_scale)).to(dtype)
    return torch._scaled_mm(rows, columns.t(), row_scale, column_scale, out_dtype=dtype, use_fast_accum=fast)
