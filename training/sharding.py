"""FSDP2 for processes without an accelerator: `accelerate` shards on GPUs only, FSDP2 itself runs over gloo as well.

So that the command that shards a model on GPUs can be tried, and tested, on a machine that has none.
"""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool


class ShardsOnCpuMixin:
    """Stands before the trainer class. Does nothing unless FSDP is asked for and the processes run on the CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        asked = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
        if not asked or self.accelerator.distributed_type != DistributedType.MULTI_CPU:
            return
        plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
        AcceleratorState().fsdp_plugin = plugin
        AcceleratorState().distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True
