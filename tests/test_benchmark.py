import re

import pytest

from helpers import run_python


@pytest.mark.slow
def test_data_prints_both_rates_and_memory():
    program = ["-m", "mixer.tools.benchmark", "data", "--config=configs/mixer_b16_i1k.py"]
    out = run_python(*program, "--seconds=10", "--batch_size=32").stdout
    assert re.search(r"1024 photographs of 500 x 375, 1[01]\d kB on average", out)
    rates = {name: int(rate) for name, rate in re.findall(r"(\w+) +[│|] +(\d+) +[│|] ", out)}
    assert rates["preprocessing"] > 0 and rates["alone"] > 0
    assert re.search(r"cores busy while preprocessing: \d.* memory \d", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no measurement: expected `data"), (["dta"], "dta: expected"), (["data"], "--config is")],
)
def test_mistakes_are_one_line(arguments, message):
    done = run_python("-m", "mixer.tools.benchmark", *arguments, check=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
