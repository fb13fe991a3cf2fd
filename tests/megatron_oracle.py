"""The real megatron-core on a CPU, to load, run and save checkpoints: none of our own code has a part in it.

    import megatron_oracle as oracle

    first, second = oracle.run([
        oracle.Load(model, oracle.Grid(tp=2, pp=2), directory, "torch", ids),
        oracle.Save(model, oracle.Grid(tp=2), other_directory, "torch_dist", ids, seed=1),
    ])

`run` starts as many processes as the largest grid needs, once, and they do all jobs in turn: importing megatron-core
takes each of them several seconds. Every job has a process group of its own, over gloo, of just the ranks of its grid.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# Without psutil its writer processes die and `dist_checkpointing.save` waits for them for ever.
AVAILABLE = all(importlib.util.find_spec(name) for name in ("torch", "psutil", "megatron")) and bool(
    importlib.util.find_spec("megatron.core")
)
ITERATION = 1
_TIMEOUT = 120  # seconds a rank waits for another


@dataclass(frozen=True)
class Model:
    """A decoder with RMSNorm, rotary embedding and SwiGLU, in Megatron's words.

    `vocab_size` counts the tokens there are, `padded_vocab_size` the rows of the embedding. Without `num_experts` the
    model is dense; `moe_layer_freq` then says, layer by layer, which have experts (1), and is 1 where all do. The
    fields from `q_lora_rank` on matter with `multi_latent_attention` only; such a model has to have `qk_layernorm`.
    """

    num_layers: int = 4
    hidden_size: int = 48
    ffn_hidden_size: int = 104
    num_attention_heads: int = 8
    num_query_groups: int = 2
    kv_channels: int = 16
    vocab_size: int = 131
    padded_vocab_size: int = 136
    norm_epsilon: float = 1e-5
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling_factor: float | None = None
    add_qkv_bias: bool = False
    add_bias_linear: bool = False
    qk_layernorm: bool = False
    tied: bool = False
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_enable_expert_bias: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_grouped_gemm: bool = False
    moe_layer_freq: int | tuple[int, ...] = 1
    mtp_num_layers: int | None = None
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 32
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128
    rope_type: str = "rope"
    rotary_scaling_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Grid:
    """How a model is cut.

    Attributes:
        tp: tensor-parallel ranks.
        pp: pipeline-parallel ranks.
        vpp: chunks of each pipeline rank, or None; to be given with a `layout` that has several.
        first: layers of the first pipeline rank, or None for an even share.
        last: layers of the last pipeline rank, or None.
        embedding_counts: the embedding counts as a layer when layers are dealt.
        loss_counts: the head counts as a layer.
        layout: Megatron's layout string, such as `Et|tttL`, or None.
        ep: expert-parallel ranks.
        etp: tensor-parallel ranks inside an expert, or None for `tp`.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    first: int | None = None
    last: int | None = None
    embedding_counts: bool = False
    loss_counts: bool = False
    layout: str | None = None
    ep: int = 1
    etp: int | None = None

    @property
    def size(self) -> int:
        """Ranks in all: as few as hold both the grid of attention and that of the experts."""
        return self.pp * math.lcm(self.tp, (self.etp or self.tp) * self.ep)


@dataclass(frozen=True)
class Load:
    """Load a checkpoint strictly and run it: gives logits, float32 [batch, tokens, vocab_size].

    With `mtp_num_layers` the logits are [1 + mtp_num_layers, batch, tokens, vocab_size]: the model's own, then what
    each further layer predicts.

    Attributes:
        model: its sizes; nothing is taken from the checkpoint's own args.
        grid: for `torch`, as the checkpoint is cut; for `torch_dist`, any.
        directory: holds latest_checkpointed_iteration.txt and the folder it names.
        fmt: `torch` or `torch_dist`.
        input_ids: int64 [batch, tokens].
        engine: build the layers Megatron-LM builds by default, those of Transformer Engine, over `engine_standin`.
    """

    model: Model
    grid: Grid
    directory: Path
    fmt: str
    input_ids: np.ndarray
    engine: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Save(Load):
    """Save a random model; gives the logits it has, as `Load` does.

    Attributes:
        seed: of the weights: N(0, 0.2), norm weights around one, the routers' expert biases too. Rows that pad the
            vocabulary are random too.
        metadata: options of the `torch_dist` layout, such as {"non_homogeneous_layers": True}.
        optimizer: save a distributed optimizer's state beside the model, in `torch_dist`: how it is shared out, as
            Megatron-LM's `distrib_optim_sharding_type` says it (`dp_reshardable`, `fully_reshardable`); None for none.
    """

    seed: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    optimizer: str | None = None


class Failed(Exception):
    """Megatron refused a job; the text is the traceback of a rank that failed."""


def run(jobs: Sequence[Load], timeout: float = 600) -> list[np.ndarray | Failed]:
    """Do all jobs in one launch.

    Args:
        jobs: done in order, so that a `Load` may read what a `Save` before it wrote; all with `engine`, or none.
        timeout: seconds for all of them together.

    Returns:
        For each job its logits, or why it failed.

    Raises:
        RuntimeError: the processes died or took too long.
    """
    world, engine = max(job.grid.size for job in jobs), jobs[0].engine
    assert all(job.engine == engine for job in jobs), "a process has one Transformer Engine"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.pickle").write_bytes(pickle.dumps(list(jobs)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        # A file for each rank's output: a full pipe would block it.
        outputs = [(folder / f"output_{rank}").open("w+") for rank in range(world)]
        command = [sys.executable, str(Path(__file__).resolve()), name, "engine" if engine else "local"]
        workers = [
            subprocess.Popen(
                [*command, str(rank)], env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            _wait(workers, time.monotonic() + timeout)
            codes = [worker.returncode for worker in workers]
            if any(code != 0 for code in codes):
                rank = next((rank for rank, code in enumerate(codes) if code != 0))
                text = (folder / f"output_{rank}").read_text()[-4000:]
                raise RuntimeError(f"megatron's processes ended with {codes} (None: not in time); rank {rank}:\n{text}")
        finally:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)  # with the writers it started
                worker.wait()
            for output in outputs:
                output.close()
        return [_result(folder, index) for index in range(len(jobs))]


def logits(model: Model, grid: Grid, directory: Path, fmt: str, input_ids: np.ndarray) -> np.ndarray:
    """Do one `Load`.

    Raises:
        Failed: megatron-core does not load the checkpoint.
    """
    return _only(run([Load(model, grid, directory, fmt, input_ids)]))


def save(model: Model, grid: Grid, fmt: str, directory: Path, seed: int, input_ids: np.ndarray) -> np.ndarray:
    """Do one `Save`; its logits."""
    return _only(run([Save(model, grid, directory, fmt, input_ids, seed)]))


def _only(results: list[np.ndarray | Failed]) -> np.ndarray:
    if isinstance(results[0], Failed):
        raise results[0]
    return results[0]


def _wait(workers: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, one has ended badly, or time is up."""
    while time.monotonic() < deadline:
        if all(worker.poll() is not None for worker in workers) or any(worker.returncode for worker in workers):
            return
        time.sleep(0.05)


def _result(folder: Path, index: int) -> np.ndarray | Failed:
    failures = sorted(folder.glob(f"failed_{index}_*"))
    if failures:
        return Failed(failures[0].read_text())
    array: np.ndarray = np.load(folder / f"logits_{index}.npy")
    return array


def arguments(model: Model, grid: Grid, fmt: str) -> Namespace:
    """The `args` of a checkpoint, named as Megatron-LM names them."""
    sizes = {
        key: value for key, value in asdict(model).items() if key not in ("vocab_size", "rope_scaling_factor", "tied")
    }
    sizes["moe_layer_freq"] = _layer_freq(model)
    return Namespace(
        **sizes,
        seq_length=64, max_position_embeddings=64, make_vocab_size_divisible_by=1,
        group_query_attention=not model.multi_latent_attention,
        position_embedding_type="rope", add_position_embedding=False, use_rotary_position_embeddings=True,
        use_rope_scaling=model.rope_scaling_factor is not None, rope_scaling_factor=model.rope_scaling_factor or 8.0,
        swiglu=True, squared_relu=False, normalization="RMSNorm", apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False, attention_dropout=0.0, hidden_dropout=0.0,
        moe_token_dispatcher_type="allgather", untie_embeddings_and_output_weights=not model.tied, ckpt_format=fmt,
        tokenizer_type="NullTokenizer", tensor_model_parallel_size=grid.tp, pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp, decoder_first_pipeline_num_layers=grid.first,
        decoder_last_pipeline_num_layers=grid.last, pipeline_model_parallel_layout=grid.layout,
        account_for_embedding_in_pipeline_split=grid.embedding_counts,
        account_for_loss_in_pipeline_split=grid.loss_counts, expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp or grid.tp, iteration=ITERATION,
        consumed_train_samples=0, params_dtype="float32",
    )  # fmt: skip


def _layer_freq(model: Model) -> int | list[int]:
    return model.moe_layer_freq if isinstance(model.moe_layer_freq, int) else list(model.moe_layer_freq)


# What follows runs in the workers only.


def gpt_model(model: Model, grid: Grid, vp_stage: int | None = None, engine: bool = False) -> Any:
    """megatron.core's GPTModel for this rank's chunk; the parallel state must be initialised."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    more: dict[str, Any] = {}
    if model.num_experts is not None:
        more |= {
            key: value for key, value in asdict(model).items() if key.startswith("moe_") and key != "moe_layer_freq"
        }
        more |= {
            "num_moe_experts": model.num_experts,
            "moe_layer_freq": _layer_freq(model),
            "moe_token_dispatcher_type": "allgather",  # the one that needs no CUDA stream
            "moe_router_load_balancing_type": "none",
        }
    if model.multi_latent_attention:
        names = [item.name for item in fields(Model)]
        more |= {name: getattr(model, name) for name in names[names.index("multi_latent_attention") :]}
        more |= {"rotary_base": model.rotary_base, "rotary_percent": model.rotary_percent}
    config = (MLATransformerConfig if model.multi_latent_attention else TransformerConfig)(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=None if model.multi_latent_attention else model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        rotary_interleaved=model.rotary_interleaved,
        add_qkv_bias=model.add_qkv_bias,
        add_bias_linear=model.add_bias_linear,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp,
        num_layers_in_first_pipeline_stage=grid.first,
        num_layers_in_last_pipeline_stage=grid.last,
        account_for_embedding_in_pipeline_split=grid.embedding_counts,
        account_for_loss_in_pipeline_split=grid.loss_counts,
        pipeline_model_parallel_layout=grid.layout,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp or grid.tp,
        mtp_num_layers=model.mtp_num_layers,
        **more,
    )
    spec = get_gpt_decoder_block_spec(config, engine, normalization="RMSNorm", vp_stage=vp_stage)
    every = get_gpt_decoder_layer_specs(config, engine, normalization="RMSNorm")
    if model.multi_latent_attention and not engine:
        for layer in (*spec.layer_specs, *every):
            layer.submodules.self_attention.submodules.core_attention = _latent_attention()
    further = None
    if model.mtp_num_layers:
        further = get_gpt_mtp_block_spec(config, every[-1], engine, vp_stage=vp_stage)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    built = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=64,
        pre_process=stage == 0 and not vp_stage,
        post_process=stage == grid.pp - 1 and vp_stage in (None, (grid.vpp or 1) - 1),
        parallel_output=False,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 8.0,
        mtp_block_spec=further,
        vp_stage=vp_stage,
    )
    return built.eval()


@cache
def _latent_attention() -> type:
    """Megatron-core's own attention without fused kernels, which takes no values of another width than keys."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LatentAttention(DotProductAttention):  # type: ignore[misc]
        def __init__(self, *given: Any, k_channels: int = 0, v_channels: int = 0, **options: Any) -> None:
            super().__init__(*given, **options)
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return LatentAttention


@contextlib.contextmanager
def _parallel(grid: Grid, rank: int, store: Path) -> Iterator[None]:
    """A process group and Megatron's parallel state for a grid."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=grid.size, timeout=timedelta(seconds=_TIMEOUT)
    )
    try:
        parallel_state.initialize_model_parallel(
            grid.tp,
            grid.pp,
            grid.vpp,
            expert_model_parallel_size=grid.ep,
            expert_tensor_parallel_size=grid.etp,
        )
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _forward(chunks: list[Any], model: Model, grid: Grid, input_ids: np.ndarray) -> np.ndarray | None:
    """Logits on the last pipeline rank, None elsewhere: each chunk hands its hidden states to the next rank."""
    import torch
    from megatron.core import parallel_state

    ids = torch.from_numpy(np.ascontiguousarray(input_ids))
    batch, tokens = ids.shape
    positions = torch.arange(tokens)[None].expand(batch, tokens)
    masked = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None]
    stage, output = parallel_state.get_pipeline_model_parallel_rank(), None
    for depth in range(grid.pp * len(chunks)):
        if depth % grid.pp != stage:
            continue
        chunk = chunks[depth // grid.pp]
        if depth > 0:
            hidden = output
            if grid.pp > 1:
                hidden = torch.empty(tokens, batch, model.hidden_size)
                torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        if depth == grid.pp * len(chunks) - 1 and model.mtp_num_layers:
            output = _predictions(chunk, ids, positions, masked)
        else:
            output = chunk(ids, positions, masked)
        if depth < grid.pp * len(chunks) - 1 and grid.pp > 1:
            torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return output.numpy()[..., : model.vocab_size] if stage == grid.pp - 1 else None


def _predictions(chunk: Any, ids: Any, positions: Any, masked: Any) -> Any:
    """The model's logits and those of its further layers, [1 + layers, batch, tokens, padded_vocab_size].

    With such layers megatron-core gives the loss alone, so the logits are taken where they leave the head: first those
    of the further layers in order, last the model's own. The loss works in place, hence the copies.
    """
    import torch

    seen: list[Any] = []
    hook = chunk.output_layer.register_forward_hook(lambda _, __, found: seen.append(found[0].transpose(0, 1).clone()))
    try:
        chunk(ids, positions, masked, labels=ids)
    finally:
        hook.remove()
    return torch.stack([seen[-1], *seen[:-1]])


def _randomise(chunk: Any, seed: int) -> None:
    """Weights that depend on the seed, the parameter, its layer, its expert and, where it is cut, the rank."""
    import torch
    from megatron.core import parallel_state

    shift = 0
    if len(chunk.decoder.layers):
        shift = chunk.decoder.layers[0].layer_number - 1
    biases = [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
    for name, parameter in (*chunk.named_parameters(), *biases):
        words = name.split(".")
        if words[:2] == ["decoder", "layers"]:
            words[2] = str(int(words[2]) + shift)
        if chunk.share_embeddings_and_output_weights and words[0] == "output_layer":
            words = ["embedding", "word_embeddings", "weight"]  # the last stage's copy
        rank = parallel_state.get_tensor_model_parallel_rank()
        if "local_experts" in words:
            place = words.index("local_experts") + 1
            local = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
            words[place] = str(int(words[place]) + local * parallel_state.get_expert_model_parallel_rank())
            rank = parallel_state.get_expert_tensor_parallel_rank()
        grouped = "experts" in words and words[-1].startswith("weight") and words[-1] != "weight"
        if grouped:
            local = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
            first = local * parallel_state.get_expert_model_parallel_rank()
            words[-1] = f"weight{int(words[-1].removeprefix('weight')) + first}"
            rank = parallel_state.get_expert_tensor_parallel_rank()
        part = rank if getattr(parameter, "tensor_model_parallel", False) or grouped else 0
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {'.'.join(words)} {part}".encode()))
        parameter.normal_(0.0, 0.2, generator=generator)
        if parameter.ndim == 1 and name.endswith(("norm.weight", "layer_norm_weight")):
            parameter.add_(1.0)


def _keys(chunks: list[Any]) -> list[str]:
    """Where Megatron-LM puts the chunks of a rank."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _rank_file(folder: Path, grid: Grid) -> Path:
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if grid.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if grid.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return folder / name / "model_optim_rng.pt"


def _sharded(chunks: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        key: chunk.sharded_state_dict(metadata=dict(metadata)) for key, chunk in zip(_keys(chunks), chunks, strict=True)
    }


def _load(job: Load, chunks: list[Any]) -> None:
    import torch
    from megatron.core import dist_checkpointing

    label = (job.directory / "latest_checkpointed_iteration.txt").read_text().strip()
    folder = job.directory / (label if label == "release" else f"iter_{int(label):07d}")
    if job.fmt == "torch":
        state = torch.load(_rank_file(folder, job.grid), weights_only=False)
        if state["checkpoint_version"] < 3.0 or "iteration" not in state or "num_layers" not in vars(state["args"]):
            raise ValueError("Megatron-LM would not take such a rank file")
        if {key for key in state if key.startswith("model")} != set(_keys(chunks)):
            raise ValueError(f"the rank file holds {sorted(state)}, the grid asks for {_keys(chunks)}")
    else:
        metadata = dist_checkpointing.load_content_metadata(str(folder)) or {}
        state = dist_checkpointing.load(_sharded(chunks, metadata), str(folder))
    for key, chunk in zip(_keys(chunks), chunks, strict=True):
        chunk.load_state_dict(state[key], strict=True)


def _save(job: Save, chunks: list[Any]) -> None:
    import torch
    from megatron.core import dist_checkpointing

    for chunk in chunks:
        _randomise(chunk, job.seed)
    folder = job.directory / f"iter_{ITERATION:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (job.directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    state = {"args": arguments(job.model, job.grid, job.fmt), "checkpoint_version": 3.0, "iteration": ITERATION}
    if job.fmt == "torch":
        path = _rank_file(folder, job.grid)
        path.parent.mkdir(exist_ok=True)
        for key, chunk in zip(_keys(chunks), chunks, strict=True):
            state[key] = chunk.state_dict_for_save_checkpoint()
        torch.save(state, path)
    else:
        metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **job.metadata}
        if job.optimizer:
            metadata["distrib_optim_sharding_type"] = job.optimizer
        state |= _sharded(chunks, metadata)
        if job.optimizer:
            state["optimizer"] = _optimizer_state(chunks, state, metadata)
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    torch.distributed.barrier()


def _optimizer_state(chunks: list[Any], state: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """The sharded state of megatron-core's distributed optimizer; experts have one of their own, chained to the other."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    with _cuda_is_cpu(), torch.enable_grad():
        shared = DistributedDataParallelConfig(use_distributed_optimizer=True)
        wrapped = [DistributedDataParallel(chunk.config, shared, chunk) for chunk in chunks]
        optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-4, use_distributed_optimizer=True), wrapped)
        for each in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in each.optimizer.param_groups:
                for parameter in group["params"]:
                    moments = {key: torch.full_like(parameter, 0.25) for key in ("exp_avg", "exp_avg_sq")}
                    each.optimizer.state[parameter] = {**moments, "step": torch.tensor(1.0)}
        return optimizer.sharded_state_dict(state, metadata=dict(metadata))


@contextlib.contextmanager
def _cuda_is_cpu() -> Iterator[None]:
    """The optimizers make tensors on the device `cuda`, and look for its name in tensors' types."""
    import torch

    factories = {name: getattr(torch, name) for name in ("tensor", "zeros", "empty", "full", "empty_like")}
    kind = torch.Tensor.type

    def on_cpu(make: Any) -> Any:
        def made(*given: Any, **options: Any) -> Any:
            if str(options.get("device")).startswith("cuda"):
                options["device"] = "cpu"
            return make(*given, **options)

        return made

    def named(tensor: Any, *given: Any, **options: Any) -> Any:
        found = kind(tensor, *given, **options)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    try:
        for name, make in factories.items():
            setattr(torch, name, on_cpu(make))
        torch.Tensor.type = named  # type: ignore[assignment, method-assign]
        yield
    finally:
        torch.Tensor.type = kind  # type: ignore[method-assign]
        for name, make in factories.items():
            setattr(torch, name, make)


def _work(folder: Path, rank: int, *, engine: bool) -> None:
    """A worker: its part in every job."""
    if engine:
        import engine_standin

        engine_standin.install()
    import torch
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    # Without Transformer Engine these modules find names of it that are None and take them for the real ones.
    multi_latent_attention.HAVE_TE = engine
    moe_utils.te_general_gemm = None
    # On a machine without CUDA megatron-core asks for three things only CUDA has.
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment, method-assign]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for index, job in enumerate(pickle.loads((folder / "jobs.pickle").read_bytes())):
        if rank >= job.grid.size:
            continue
        try:
            with _parallel(job.grid, rank, folder / f"store_{index}"):
                chunks, problems = [], [None] * job.grid.size
                try:
                    stages = [None] if job.grid.vpp is None else range(job.grid.vpp)
                    chunks = [gpt_model(job.model, job.grid, stage, job.engine) for stage in stages]
                    (_save if isinstance(job, Save) else _load)(job, chunks)
                    problem = None
                except BaseException:  # its CheckpointException is no Exception
                    problem = traceback.format_exc()
                # All stop if one does, or the others would wait for it in vain.
                torch.distributed.all_gather_object(problems, problem)
                if any(problems):
                    raise RuntimeError(next(text for text in problems if text))
                output = _forward(chunks, job.model, job.grid, job.input_ids)
                if rank == job.grid.size - 1:
                    np.save(folder / f"logits_{index}.npy", output)
        except Exception as error:
            (folder / f"failed_{index}_{rank}").write_text(f"{error}\n{traceback.format_exc()}")


if __name__ == "__main__":
    # The jobs were pickled under the module's name, and megatron-core spawns processes that import this file again.
    import megatron_oracle

    megatron_oracle._work(Path(sys.argv[1]), int(sys.argv[3]), engine=sys.argv[2] == "engine")
