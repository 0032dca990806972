"""Benchmarks, each a thin adapter to the field's own package. The registry is light: importing it loads no library."""

from rmipo.evaluation import alpaca, constraints, hh, leaderboard, mtbench, ranking, reward, specificity
from rmipo.evaluation.benchmark import Benchmark

MODULES = (alpaca, mtbench, leaderboard, hh, reward, constraints, specificity, ranking)
BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in MODULES}


def benchmark_of(metric: str) -> Benchmark | None:
    """The benchmark that has a metric of this name, None without one."""
    return next((benchmark for benchmark in BENCHMARKS.values() if metric in benchmark.metrics), None)


def metric_label(metric: str) -> str:
    """What tables and axes call a metric; its own name if no benchmark has it."""
    benchmark = benchmark_of(metric)
    return metric if benchmark is None else benchmark.metrics[metric].label
