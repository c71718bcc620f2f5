"""`tokensel score --ray_actors 2`, on a Ray of this machine."""

from __future__ import annotations

import builtins
import os
import signal

import pytest
from recorded import arguments

from tokensel.cli import main

pytestmark = pytest.mark.usefixtures("small_row_groups")


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'tokensel[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_two_actors_write_the_bytes_of_one_process(tmp_path, model_dir, data, capsys, ray, monkeypatch):
    whole, output = tmp_path / "whole.parquet", tmp_path / "h.parquet"
    assert main(arguments(model_dir, data, whole)) == 0
    monkeypatch.chdir(tmp_path)  # a relative output, and a worker that may stand elsewhere
    assert main(arguments(model_dir, data, output.name, ray_actors=2)) == 0
    assert "tokens/s of 2 actors" in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "h.parquet.partial").exists()


@pytest.mark.slow
def test_an_actor_that_is_killed_is_started_again(tmp_path, model_dir, data, ray, monkeypatch):
    from tokensel import on_ray

    killed = tmp_path / "killed"

    class Killed(on_ray.Scorer):
        def __call__(self, rows):
            if not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(rows)

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    whole, output = tmp_path / "whole.parquet", tmp_path / "h.parquet"
    assert main(arguments(model_dir, data, whole)) == 0
    monkeypatch.setattr(on_ray, "Scorer", Killed)
    assert main(arguments(model_dir, data, output, ray_actors=1)) == 0
    assert killed.exists() and output.read_bytes() == whole.read_bytes()


def test_without_ray_it_says_what_to_install(tmp_path, model_dir, data, capsys, monkeypatch):
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(arguments(model_dir, data, tmp_path / "h.parquet", ray_actors=2)) == 2
    assert "ray_actors needs Ray: pip install 'tokensel[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [({"device_map": "auto"}, "leave device_map out"), ({}, "ray_actors")])
def test_other_places_of_the_model_are_refused(tmp_path, model_dir, data, capsys, more, message):
    pytest.importorskip("ray", reason="needs Ray: pip install 'tokensel[ray]'")
    actors = 2 if more else -1
    assert main(arguments(model_dir, data, tmp_path / "h.parquet", ray_actors=actors, **more)) == 2
    assert message in capsys.readouterr().err
