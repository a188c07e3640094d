"""FSDP2 for training through fake quantization: fp32 shards, autocast, and whole heads.

accelerate's FSDP2 casts every parameter to bf16 as it gathers it when `bf16` is on. Codes and
scales would then be those of a rounded weight and a rounded log-scale, not those that are saved
and exported. Here parameters are gathered as they are, in fp32, and autocast casts what is
multiplied, exactly as on one GPU.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)


def tell_of_idle_gpus(args: TrainingArguments) -> None:
    """A warning where a process alone trains on one of several GPUs."""
    here = torch.cuda.device_count()
    if args.n_gpu and args.world_size == 1 and here > 1:
        logger.warning(
            "GraceTrainer: one process trains on one GPU, here are %d; to use all of them: "
            "torchrun --nproc-per-node=%d -m grace.cli train …",
            here,
            here,
        )


def keep_fp32(plugin: Any) -> None:
    """Let accelerate's FSDP2 plugin gather parameters in their own dtype and cast nothing.

    Raises:
        ValueError: FSDP1, whose flattened parameters have no rows of a scale.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if plugin.fsdp_version != 2:
        raise ValueError(
            f"GraceConfig: fsdp_config version must be 2, got {plugin.fsdp_version}; version 1 "
            "flattens weights and log-scales together"
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


class ShardingTrainer(Trainer):
    """A Trainer whose FSDP2 keeps fp32 parameters, on GPUs and, for tests, on CPUs."""

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**options)
        if arguments.get("fsdp_plugin") is not None:
            keep_fp32(arguments["fsdp_plugin"])
        self._fsdp_plugin = arguments.get("fsdp_plugin")
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer, but ranks on CPUs shard too: accelerate would take DDP without a word."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self._fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            # As accelerate does on GPUs: every new AcceleratorState copies what stands there.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = self._fsdp_plugin
            # Without one torch takes the mesh of the machine's GPUs, if it has any.
            state.parallelism_config = ParallelismConfig(dp_shard_size=state.num_processes)
            state.device_mesh = state.parallelism_config.build_device_mesh("cpu")
            self.is_fsdp_enabled = True

    def shard_by(self, layer: str) -> None:
        """Name of the class that is gathered one by one, unless `fsdp_config` gives some.

        Only layers that every forward runs as often on every rank can be: decoder layers. The rest
        (embeddings, vision tower, head) is gathered when the model's forward begins, whatever a
        rank's rows hold. accelerate's own choice fails on LLaVA besides: it looks for the layers
        of CLIP's text model, which is not there.
        """
        plugin = self._fsdp_plugin
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = [layer]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast of a sharded model's forward, which accelerate leaves to its casting policy;
        of any other model accelerate has made a part of its forward."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        if not self.is_fsdp_enabled or not (self.args.bf16 or self.args.fp16):
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype)


def shard_frozen(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Shard a frozen model over all ranks, in place: each of `layers`, and the rest as one.

    A layer's parameters are whole only while it runs. The rest (embeddings, vision tower, head) is
    whole from the first forward on. Each part goes to `device` as it is sharded, so that a model on
    the host never has to fit a GPU as a whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def first_rows(parameter: Tensor, rows: int) -> tuple[Tensor, int]:
    """Those of the first `rows` rows that this rank holds, and the number of the first of them.

    FSDP2 gives each rank as many rows as torch.chunk would; a rank may hold none.
    """
    sharded: Any = parameter
    if not hasattr(sharded, "to_local"):
        return parameter[:rows], 0
    mesh, local = sharded.device_mesh, sharded.to_local()
    each = -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(parameter.shape[0], each * mesh.get_local_rank(mesh.ndim - 1))
    return local[: max(0, rows - start)], start
