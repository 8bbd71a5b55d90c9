"""The simplest plan: the whole network on one slot, run by the calling thread. Read it first; the other plans do the same with more slots.

    plan      "single": one replica, all its pieces on the home slot. With one working slot there is no session: `sampling_function` does the same
    place     weights that an earlier plan moved to other slots come home; memory management evicts what is idle until everything fits, loads it,
              and holds it until the run ends
    run       per step one call of the network: all rows go through all segments in order, on the slot's device
    failure   a shortage of memory is the session's: it evicts idle models and repeats the step

Example: two pictures with CFG are 4 rows of latents (4, 4, 64, 64). `OneSlot.run` starts the state of the program with them, runs segment after
segment, and returns the output (4, 4, 64, 64). Knows no samplers, no other slots and no families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backend import memory_management
from backend.nn.network_call import NetworkCall
from backend.parallel.placing.placement import place_whole
from backend.patcher.base import ModelPatcher
from backend.patcher.unet import UnetPatcher


@dataclass(frozen=True, eq=False)
class OneSlot:
    """A run of the whole network on its home slot. `companions`: models that the run needs on the same device, such as ControlNets."""

    unet: UnetPatcher
    companions: Sequence[ModelPatcher] = ()

    def place(self, *, working_bytes: int, preserved_bytes: int) -> None:
        """Load everything whole and hold it.

        Args:
            working_bytes: memory that a call needs besides the weights.
            preserved_bytes: memory that stays free for others.
        Raises: OutOfMemory if the slot is too small even after everything idle has been evicted.
        """
        place_whole(self.unet)
        self.unet.model.runner = None
        models = [self.unet, *self.companions]
        memory_management.load_models_gpu(models, memory_required=working_bytes, hard_memory_preservation=preserved_bytes)
        memory_management.hold_models(models)

    def run(self, call: NetworkCall) -> Tensor:
        """All rows in one pass.

        Args:
            call: inputs on the slot's device, one row per picture and branch; its deferred residuals are computed first.
        Returns: the network's output, a row for each row of the call, on the same device.
        Raises: torch.OutOfMemoryError.
        """
        return self.unet.model.run_here(call)
