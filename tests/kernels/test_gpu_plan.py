"""What `make gpu` would bench and sweep, as far as a machine without a GPU can tell."""

import copy
import importlib
import sys
from pathlib import Path

import pytest

from tilewise_kernels import adamw_triton, configs

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def part(monkeypatch):
    """part(name): a module of benches/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    yield importlib.import_module
    for name in ("gpu_plan", "gpu_sweeps"):
        sys.modules.pop(name, None)


def test_every_race_fits_its_case(part) -> None:
    plan = part("gpu_plan")
    races = [*plan.plan(), *plan.SMALL]
    for race in races:
        plan.check(race)
        plan.check(plan.shrunk(race))
    assert len({str(race) for race in races}) == len(races)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_candidate_is_a_launch_and_leaves_the_table_alone(part, architecture: int) -> None:
    tables = ("ATTENTION", "DECODE", "NORM", "LINEAR", "WALK", "TOPK", "ROTARY", "ACTIVATION")
    block = adamw_triton.ADAMW
    before = {name: copy.deepcopy(getattr(configs, name)) for name in tables}
    for knob in part("gpu_sweeps").knobs(architecture, dry_run=False):
        entry = knob.at(knob.entry, "meta")
        assert knob.found(entry).is_meta, knob.title
        assert knob.candidates and knob.entry not in knob.candidates, knob.title
        for candidate in knob.candidates:
            used = [(x.arguments, x.options) for x in knob.at(candidate, "meta")]
            assert str(used) != str([(x.arguments, x.options) for x in entry]), candidate
    after = {name: copy.deepcopy(getattr(configs, name)) for name in tables}
    assert after == before and adamw_triton.ADAMW is block
