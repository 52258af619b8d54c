"""``python cpu_launch.py ...`` is ``python -m rankalign ...`` on CPUs.

accelerate knows no FSDP there, and DeepSpeed would first compile a communication library. Only tests need either.

With ``RANKALIGN_TEST_FACTS`` in the environment, the first process writes there what accelerate made of the launch.
"""

from __future__ import annotations

import json
import os
import signal
import sys

FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def fsdp_on_cpu() -> None:
    """Have accelerate take several CPU processes for what FSDP runs on."""
    from accelerate import state

    original = state.AcceleratorState.__init__

    def init(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        fresh = not state.AcceleratorState._shared_state
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if fresh and plugin is not None:
            self.distributed_type = state.DistributedType.FSDP
            self.fsdp_plugin = plugin
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP

    state.AcceleratorState.__init__ = init


def no_compiled_communication() -> None:
    """Plain gloo for DeepSpeed."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def note_facts(path: str) -> None:
    """Write what the trainer runs in, when it stops."""
    from rankalign.training import run

    original = run.Launch.on_train_begin

    def on_train_begin(self, args, state, control, **more):  # type: ignore[no-untyped-def]
        original(self, args, state, control, **more)
        wrapped, kind = self.trainer.model_wrapped, self.trainer.accelerator.distributed_type.value
        facts = {"type": kind, "wrapper": type(wrapped).__name__, "processes": args.world_size}
        if args.process_index == 0:
            with open(path, "w") as out:
                json.dump(facts, out)

    run.Launch.on_train_begin = on_train_begin


def interrupt(step: int) -> None:
    """Send the second process a Ctrl-C after so many updates."""
    from rankalign.training.run import JsonlLog

    original = JsonlLog.on_log

    def on_log(self, args, state, control, **more):  # type: ignore[no-untyped-def]
        original(self, args, state, control, **more)
        if state.global_step == step - 1 and args.process_index == 1:
            signal.raise_signal(signal.SIGINT)

    JsonlLog.on_log = on_log


if __name__ == "__main__":
    if FSDP:
        fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or "--deepspeed" in sys.argv:
        no_compiled_communication()
    if "RANKALIGN_TEST_FACTS" in os.environ:
        note_facts(os.environ["RANKALIGN_TEST_FACTS"])
    if "RANKALIGN_TEST_STOP" in os.environ:
        interrupt(int(os.environ["RANKALIGN_TEST_STOP"]))
    from rankalign.cli import main

    sys.exit(main())
