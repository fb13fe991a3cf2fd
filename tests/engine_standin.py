"""A stand-in for Transformer Engine, which needs CUDA: the classes megatron-core's layers are made of, in plain PyTorch.

    engine_standin.install()   # before megatron-core is imported

megatron-core 0.16 asks for Transformer Engine 2.9 to 2.11. What a checkpoint sees of it is restated here from its
sources (v2.9): which classes there are, how their parameters are called and shaped, and which keep state of their own:
`TransformerEngineBaseModule` (Linear, LayerNormLinear, GroupedLinear, DotProductAttention; `pytorch/module/base.py`) and
`BasicOperation` (LayerNorm, RMSNorm; `pytorch/ops/op.py`) have `get_extra_state`, which gives an empty byte tensor
without FP8, and `set_extra_state`, which takes that or None. Attention alone lets its key be missing
(`attention/dot_product_attention`). The mathematics is that of the names; FP8, fusions and CUDA are not here.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

VERSION = "2.9.0"


class _Stateful(nn.Module):
    """A module with state of its own."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and (not isinstance(state, Tensor) or state.numel()):
            raise RuntimeError(f"there is no FP8 here to take {state!r}")


class TransformerEngineBaseModule(_Stateful):
    """What linear maps and attention have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": DelayedScaling()}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Nothing to do without FP8."""


def _parameter(init: Callable[[Tensor], Any] | None, device: Any, dtype: Any, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    with torch.no_grad():
        parameter.zero_() if init is None else init(parameter)
    return parameter


class Linear(TransformerEngineBaseModule):
    """A linear map, cut over tensor ranks by rows (`column`), by columns (`row`), or not at all."""

    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False, fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None, tp_size: int = 1, get_rng_state_tracker: Any = None, init_method: Any = None,
        bias: bool = True, return_bias: bool = False, params_dtype: Any = None, parallel_mode: str | None = None,
        device: Any = "cpu", rng_tracker_name: str | None = None, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not sequence_parallel and not fuse_wgrad_accumulation
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.weight = _parameter(init_method, device, params_dtype, self.out_features, self.in_features)
        for name, value in (("tensor_model_parallel", parallel_mode in ("column", "row")),
                            ("partition_dim", 1 if parallel_mode == "row" else 0), ("partition_stride", 1)):  # fmt: skip
            setattr(self.weight, name, value)
        if bias:
            self.bias = _parameter(None, device, params_dtype, self.out_features)
            self.bias.tensor_model_parallel = parallel_mode == "column"  # type: ignore[attr-defined]

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        own = self.parallel_mode == "row" and self.tp_size > 1
        out = functional.linear(inp, self.weight, self.bias if self.apply_bias and not own else None)
        if own:
            torch.distributed.all_reduce(out, group=self.tp_group)
            out = out + self.bias if self.apply_bias else out
        return (out, self.bias) if self.return_bias else out


def _rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight + 1 if zero_centered else weight).float()).to(x.dtype)


class LayerNormLinear(Linear):
    """A norm, then a linear map."""

    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False, return_layernorm_output: bool = False, params_dtype: Any = None,
        device: Any = "cpu", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **options)
        assert normalization == "RMSNorm" and not return_layernorm_output
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, device=device, dtype=params_dtype))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return super().forward(_rms_norm(inp, self.layer_norm_weight, self.eps, self.zero_centered_gamma))


class GroupedLinear(TransformerEngineBaseModule):
    """A linear map for each of several runs of rows."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, init_method: Any = None, bias: bool = True,
        return_bias: bool = False, params_dtype: Any = None, parallel_mode: str | None = None, device: Any = "cpu",
        tp_size: int = 1, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert parallel_mode is None and not bias
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        for k in range(num_gemms):
            setattr(self, f"weight{k}", _parameter(init_method, device, params_dtype, out_features, in_features))

    def forward(self, inp: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Any:
        parts = torch.split(inp, [int(count) for count in m_splits])
        return torch.cat([part @ getattr(self, f"weight{k}").T for k, part in enumerate(parts)])


class _Norm(_Stateful):
    """An operation (`ops.RMSNorm`, `ops.LayerNorm`)."""

    def __init__(
        self, normalized_shape: Any = None, eps: float = 1e-5, sequence_parallel: bool | None = None,
        params_dtype: Any = None, zero_centered_gamma: bool = False, hidden_size: int | None = None,
        device: Any = "cpu", dtype: Any = None, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=params_dtype or dtype))

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps, self.zero_centered_gamma)


class RMSNorm(_Norm):
    """RMSNorm."""


class LayerNorm(_Norm):
    """Only to be named: none of the models here has one."""


class DotProductAttention(TransformerEngineBaseModule):
    """Causal attention over [tokens, batch, heads, width]."""

    def __init__(
        self, num_attention_heads: int, kv_channels: Any, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, attn_mask_type: str = "causal", tp_size: int = 1,
        softmax_scale: float | None = None, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert "causal" in attn_mask_type
        width = kv_channels[0] if isinstance(kv_channels, tuple) else kv_channels
        self.softmax_scale = 1.0 / math.sqrt(width) if softmax_scale is None else softmax_scale

        def let_it_be_missing(module: nn.Module, incompatible: Any) -> None:
            for key in [key for key in incompatible.missing_keys if "core_attention._extra_state" in key]:
                incompatible.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(let_it_be_missing)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **unused: Any) -> Tensor:
        share = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = q.float() @ k.float().transpose(-1, -2) * self.softmax_scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v
        return mixed.permute(2, 0, 1, 3).flatten(2)


class QuantizedTensor:
    """Of which there are none."""


class DelayedScaling:
    """An FP8 recipe, which nothing here follows."""


class CudaRNGStatesTracker:
    """What its name says; megatron-core derives from it."""


class FP8GlobalStateManager:
    """FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(*_: Any, **__: Any) -> Iterator[None]:
    """FP8 is off."""
    yield


def install() -> None:
    """Put the stand-in where `import transformer_engine` finds it; names it lacks are missing as in another version."""
    import importlib.machinery

    def module(name: str, **names: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        made.__path__ = []
        vars(made).update(names)
        sys.modules[name] = made
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, made)
        return made

    classes = {kind.__name__: kind for kind in (
        Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)}  # fmt: skip
    module("transformer_engine", __version__=VERSION)
    module("transformer_engine.pytorch", **classes)
    module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast)
    module("transformer_engine.pytorch.distributed", CudaRNGStatesTracker=CudaRNGStatesTracker,
           activation_recompute_forward=fp8_autocast)  # fmt: skip
    module("transformer_engine.pytorch.ops", Sequential=nn.Sequential, FusibleOperation=_Norm)
    module("transformer_engine.pytorch.router", fused_compute_score_for_moe_aux_loss=None, fused_moe_aux_loss=None,
           fused_topk_with_score_function=None)  # fmt: skip
    module("transformer_engine.pytorch.tensor", QuantizedTensor=QuantizedTensor)
    module("transformer_engine.pytorch.module")
    module("transformer_engine.pytorch.module.base", TransformerEngineBaseModule=TransformerEngineBaseModule)
    module("transformer_engine.common")
    module("transformer_engine.common.recipe", DelayedScaling=DelayedScaling)
