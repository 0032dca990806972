"""The GPU day: its files arrive whole, and every leg runs, on a CPU."""

import json

import pytest

from benchmarks import gpu_day


def test_files_arrive_as_they_were_packed_in_folders_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "PART", 1000)
    stock = tmp_path / "packed/stock"
    stock.mkdir(parents=True)
    files = {"a-1.0-py3-none-any.whl": b"a" * 300, "b.whl": bytes(range(250)) * 10, "c.whl": b"c" * 700}
    for name, content in files.items():
        (stock / name).write_bytes(content)
    folders = gpu_day.divide(stock, tmp_path / "packed")
    assert all(sum(path.stat().st_size for path in folder.iterdir()) <= 1000 for folder in folders)
    for folder in reversed(folders):
        gpu_day.take(folder, tmp_path / "taken")
    assert {path.name: path.read_bytes() for path in (tmp_path / "taken/stock").iterdir()} == files


def test_what_a_machine_has_is_not_packed(tmp_path):
    there = tmp_path / "there.txt"
    there.write_text("transformers==5.17.0\nPyYAML==6.0.3\n")
    needed = {"transformers": "5.23.0", "trl": "1.16.0", "pyyaml": "6.0.2"}
    assert gpu_day.missing(needed, there) == {"transformers": "5.23.0", "trl": "1.16.0"}
    found = gpu_day.requirements()
    assert {"transformers", "trl", "datasets", "deepspeed"} <= found.keys() and "torch" not in found


@pytest.mark.slow
def test_every_leg_runs_and_is_not_run_again(tmp_path, capfd):
    assert gpu_day.run(tmp_path, minutes=30, only=(), dry=True) == 0
    legs = {
        path.stem: json.loads(path.read_text()) for path in (tmp_path / "dry").glob("*.json") if "-" not in path.stem
    }
    assert legs.keys() == {"kernels", "step", "liger", "resume", "study"}
    assert [command["code"] for leg in legs.values() for command in leg["commands"]] == [0] * 4
    capfd.readouterr()
    assert gpu_day.run(tmp_path, minutes=30, only=(), dry=True) == 0
    assert capfd.readouterr().out.count("has passed") == 5
