"""Training speed of the models: images a second through forward, backward and optimizer, on made-up images.

Run:     python benchmarks/models.py medmamba_t resnet50 --size 32 --threads 1 2
         python benchmarks/models.py --size 224 --batch 64 --activation-checkpointing
CUDA:    used where there is one, with bf16 autocast; peak memory is said
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn.functional import cross_entropy

from medtune.models import available, build, checkpoint_activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(available()))
    parser.add_argument("--size", type=int, default=32, help="side of the images in px")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--activation-checkpointing", action="store_true", help="compute activations again, keep fewer")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    for threads in options.threads if device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        for name in options.models:
            measure(name, options.batch, options.size, options.steps, device, options.activation_checkpointing)


def measure(name: str, batch: int, size: int, steps: int, device: torch.device, recompute: bool) -> None:
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(name).to(device).train()
    if recompute:
        checkpoint_activations(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.randint(0, 2, (batch,), device=device)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        return time.perf_counter() - start

    for _ in range(2):
        step()
    seconds = [step() for _ in range(steps)]
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
    memory = "" if device.type == "cpu" else f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GB"
    print(
        f"{name:<12} {size} px, batch {batch}, {where}: {batch / min(seconds):6.1f} images/s at best, "
        f"{batch / statistics.median(seconds):6.1f} in the median{memory}",
        flush=True,
    )


if __name__ == "__main__":
    main()
