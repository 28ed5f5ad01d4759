"""Where the time of a training step goes: shares of the operations, by torch.profiler."""

import argparse

import torch
from bench_speed import BLOCKS, NETWORK, SINUSOIDS, D
from torch.profiler import ProfilerActivity, profile
from training import print_table

from pyro_sinflow import SinusoidalFlow

GROUPS = {
    "matrix products of the networks": ("aten::mm", "aten::addmm"),
    "tangents": ("aten::tan", "aten::tan_"),
    "small matrix products of the sinusoids": ("aten::bmm", "aten::baddbmm"),
    "products, masks among them": ("aten::mul", "aten::mul_", "aten::addcmul"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_"),
}


def main():
    """Profiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="to profile (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    flow = SinusoidalFlow(D, transforms=BLOCKS, scale=False, sinusoids=SINUSOIDS, **NETWORK)
    x = torch.randn(128, D)

    def step():
        flow.zero_grad()
        flow().log_prob(x).mean().backward()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(args.steps):
            step()
    events = {event.key: event for event in profiler.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    rows, rest, calls = [], total, sum(event.count for event in events.values())
    for name, keys in GROUPS.items():
        seen = [events[key] for key in keys if key in events]
        time, count = sum(e.self_cpu_time_total for e in seen), sum(e.count for e in seen)
        rest, calls = rest - time, calls - count
        rows.append((name, f"{time / total:.0%}", f"{count / args.steps:,.0f}"))
    rows.append(("all else", f"{rest / total:.0%}", f"{calls / args.steps:,.0f}"))
    print_table(("of a step", "share", "calls"), rows)


if __name__ == "__main__":
    main()
