"""Overhead of the live panel: steps of one trainer in a real kernel, by a loop in a cell and by a panel.

    python benchmarks/lab_step.py       two model sizes; loop and panel alternate, so noise affects both

Two figures: the ratio of seconds per step, which is noisy on a busy machine; and the share of the panel's
time that is spent outside of steps (drawing, widgets, yielding to the kernel), which is stable.
"""
import asyncio
import os
import sys
import tempfile

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

SIZES = {"a step of milliseconds": (32, 1, 4, 64), "a step of a tenth of a second": (192, 4, 16, 128)}
ROUNDS = 3
SECONDS = 30 # per round, for each of the two; the first pictures come more often than later ones
SETUP = """
import json, time
import mlx_pretrain
from mlx_pretrain.lab import Live
from mlx_pretrain.pretrain import PretrainConfig, PretrainTrainer
hidden, layers, batch, context = {size}
text = "The cat sat on the mat, and the dog lay by the door. " * 4000
with open("text.jsonl", "w") as f: f.write(json.dumps({{"text": text}}))
trainer = PretrainTrainer(PretrainConfig.model_validate_json(json.dumps({{
    "data": {{"input_file": "text.jsonl", "preprocessing": {{"max_context_size": context}}}},
    "model": {{"dimensions": {{"hidden_size": hidden, "num_layers": layers}},
              "attention": {{"num_heads": 2}}}},
    "training": {{"hyperparameters": {{"batch_size": batch, "iters": 10**6}}}}}})))
times = []
trainer.callbacks.append(lambda trainer, metrics: times.append(time.perf_counter()))
live = Live(trainer, root=None)
phases, observe, inside, marks = trainer.phases, trainer.callbacks[0], [0.0], []
def timed(add, call, *args):
    start = time.perf_counter()
    try: return call(*args)
    finally: inside[0] += add * (time.perf_counter() - start)
def counted():
    pieces = phases()
    while True:
        try: piece = timed(1, next, pieces)
        except StopIteration as end: return end.value
        yield piece
trainer.phases = counted
trainer.callbacks[0] = lambda *args: timed(-1, observe, *args)
trainer.callbacks.append(lambda trainer, metrics: marks.append((times[-1], inside[0])))
for _ in range(10): trainer.step()
"""
PLAIN = (
    "times.clear(); end = time.perf_counter() + {seconds}\nwhile time.perf_counter() < end: trainer.step()"
)
START, PAUSE = "times.clear(); marks.clear(); live.start()", "live.pause()"
TAKEN = "print((times[-1] - times[5]) / (len(times) - 6))"
SHARE = "print(1 - (marks[-1][1] - marks[5][1]) / (marks[-1][0] - marks[5][0]))"


async def main():
    home = tempfile.mkdtemp()
    for size_name, size in SIZES.items():
        manager = AsyncKernelManager(kernel_name="python3",
                                     kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        await manager.start_kernel(cwd=home, env=os.environ | {"MLX_PRETRAIN_CACHE": home},
                                   extra_arguments=["--log-level=40"])
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready()

        async def cell(code):
            texts = []
            def keep(message):
                content = message["content"]
                texts.append(content.get("text") or "".join(content.get("traceback", ())))
            await client.execute_interactive(code, output_hook=keep, timeout=600)
            return "".join(texts)

        print(await cell(SETUP.format(size=size)), file=sys.stderr)
        ratios, shares = [], []
        for turn in range(ROUNDS):
            taken = {}
            for variant in ("plain", "panel") if turn % 2 else ("panel", "plain"):
                if variant == "plain": await cell(PLAIN.format(seconds=SECONDS))
                else:
                    await cell(START)
                    await asyncio.sleep(SECONDS)
                    await cell(PAUSE)
                taken[variant] = float((await cell(TAKEN)).split()[-1])
                if variant == "panel": shares.append(float((await cell(SHARE)).split()[-1]))
            ratios.append(taken["panel"] / taken["plain"])
            plain_ms, panel_ms = 1000 * taken["plain"], 1000 * taken["panel"]
            print(f"{size_name}: plain {plain_ms:.2f} ms, panel {panel_ms:.2f} ms, ratio {ratios[-1]:.4f}, "
                  f"share {100 * shares[-1]:.2f}%", flush=True)
        ratio, share = (sorted(values)[ROUNDS // 2] for values in (ratios, shares))
        print(f"{size_name}: {100 * (ratio - 1):.1f}% more seconds per step, {100 * share:.2f}% of the time "
              f"outside of steps (medians of {ROUNDS})", flush=True)
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


asyncio.run(main())
