"""``python cpu_launch.py ...`` is ``python -m rankalign ...`` on CPUs.

accelerate knows no FSDP there, and DeepSpeed would first compile a communication library. Only tests need either.

With ``RANKALIGN_TEST_FACTS`` in the environment, each process writes there, its number behind the name, what accelerate
made of the launch and what ran.
"""

from __future__ import annotations

import contextlib
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


def note_rows() -> dict[str, int]:
    """Count the calls of the model that keep a graph, those that this process's own parts need, and, with
    ``RANKALIGN_TEST_PEAK`` in the environment, the most bytes that a micro-batch adds."""
    from rankalign.rows import logps
    from rankalign.training import in_step
    from rankalign.training.rank import RankTrainer

    original, run, work = logps.label_states, RankTrainer.training_step, in_step.work
    facts, step = {"runs": 0, "own": 0, "peak": 0}, list[bool]()

    def label_states(lm, rows, embeddings=None):  # type: ignore[no-untyped-def]
        import torch

        facts["runs"] += torch.is_grad_enabled()
        return original(lm, rows, embeddings)

    def noted(trainer, parts):  # type: ignore[no-untyped-def]
        found = work(trainer, parts)
        if step:
            facts["own"] += found.passes[1]
        return found

    def training_step(self, *words):  # type: ignore[no-untyped-def]
        step.append(True)  # before, the processes agree on how often all of them run
        with live_bytes() if "RANKALIGN_TEST_PEAK" in os.environ else contextlib.nullcontext({"peak": 0}) as memory:
            loss = run(self, *words)
        step.clear()
        facts["peak"] = max(facts["peak"], memory["peak"])
        return loss

    logps.label_states, in_step.work, RankTrainer.training_step = label_states, noted, training_step
    return facts


@contextlib.contextmanager
def live_bytes():  # type: ignore[no-untyped-def]
    """Bytes of the tensors made in this context: those that live, and the most at once."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    counts, seen = {"live": 0, "peak": 0}, weakref.WeakSet()

    def drop(size: int) -> None:
        counts["live"] -= size

    class Memory(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if type(tensor) is torch.Tensor and tensor.untyped_storage() not in seen:
                    storage = tensor.untyped_storage()
                    seen.add(storage)
                    counts["live"] += storage.nbytes()
                    counts["peak"] = max(counts["peak"], counts["live"])
                    weakref.finalize(storage, drop, storage.nbytes()).atexit = False
            return out

    with Memory():
        yield counts


def note_facts(path: str) -> None:
    """Write what the trainer runs in, when it stops."""
    from rankalign.training import run

    original, facts = run.Launch.on_train_begin, note_rows()

    def on_train_begin(self, args, state, control, **more):  # type: ignore[no-untyped-def]
        original(self, args, state, control, **more)
        wrapped, kind = self.trainer.model_wrapped, self.trainer.accelerator.distributed_type.value
        facts.update({"type": kind, "wrapper": type(wrapped).__name__, "processes": args.world_size})

    def on_train_end(self, args, state, control, **more):  # type: ignore[no-untyped-def]
        with open(f"{path}.{args.process_index}", "w") as out:
            json.dump(facts, out)

    run.Launch.on_train_begin, run.Launch.on_train_end = on_train_begin, on_train_end


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
