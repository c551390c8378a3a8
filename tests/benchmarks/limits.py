"""Measure what this machine can do: the rate of large matrix products, and the time of `advantages` on a large table.

The speed chapter draws the first as a bound. One JSON line, appended to --log FILE if one is given.
"""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from rvpo_nb.advantage import advantages


def median_time(f, repeats=15):
    "Return the median seconds of a call, after one that is not counted."
    f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gflops(dtype, device, n):
    "Return the rate of an n x n matrix product, in billions of operations per second."
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / median_time(lambda: a @ b) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--log', type=Path, help='append the JSON line to this file')
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    torch.set_num_threads(args.threads)
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    cpu = names[0] if names else platform.processor()
    device, n = ('cuda', 8192) if cuda else ('cpu', 2048)
    out = dict(shape='machine', device=torch.cuda.get_device_name() if cuda else cpu, threads=args.threads,
               float32_gflops=gflops(torch.float32, device, n), bfloat16_gflops=gflops(torch.bfloat16, device, n))
    rewards = torch.randn(4096, 16, 17, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    out['advantages_ms'] = 1e3 * median_time(lambda: advantages(rewards))
    out = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in out.items()}
    print(json.dumps(out))
    if args.log:
        with args.log.open('a') as f: f.write(json.dumps(out) + '\n')


if __name__ == '__main__': main()
