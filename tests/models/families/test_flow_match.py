"""The schedule of a plan, which is computed without torch, is that of a build, which diffusers computes."""

import pytest

from secondcast.models.families.flow_match import flow_match_schedule
from secondcast.models.families.flux import FLUX, shift_of
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.planned import bundled_teachers, planned_teacher


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["diffusers", "distillt5"])
@pytest.mark.parametrize("teacher", [name for name in bundled_teachers() if planned_teacher(name)[0].family is FLUX])
def test_sigmas_and_timesteps_of_a_plan_are_those_of_diffusers_bit_for_bit(teacher, name, dtype):
    config = planned_teacher(teacher)[0].config("scheduler")
    for steps in (1, 2, 4, 20, 28, 50, 999):
        for tokens in (1, 256, 1024, 4096, 4107):
            of = {"steps": steps, "image_tokens": tokens}
            exact = FLUX.schedule(name, config, **of, dtype=DTYPES[dtype])
            # Without falling back on diffusers.
            mu, own = shift_of(config, tokens), name == "distillt5"
            found = flow_match_schedule(config, steps=steps, mu=mu, own_sigmas=own, dtype=dtype)
            assert found == (exact.sigmas, exact.timesteps), of
            assert FLUX.planned_schedule(name, config, **of, dtype=dtype) == found


def test_a_scheduler_with_other_options_is_computed_by_diffusers_in_a_plan_too():
    config = planned_teacher("FLUX.1-dev")[0].config("scheduler") | {"shift_terminal": 0.1}
    of = {"steps": 4, "image_tokens": 1024}
    exact = FLUX.schedule("diffusers", config, **of, dtype=DTYPES["float32"])
    assert FLUX.planned_schedule("diffusers", config, **of, dtype="float32") == (exact.sigmas, exact.timesteps)
    assert exact.timesteps[-1] == pytest.approx(0.1)
