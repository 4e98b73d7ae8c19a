"""A device by name."""

import pytest

from secondcast.models.device import usable_device
from secondcast.storage_schemas.errors import BadSettings


@pytest.mark.parametrize(
    ("name", "reason"), [("gpu", "no such device"), ("cpu:x", "Invalid device string: 'cpu:x'"), ("meta:-1", ".+")]
)
def test_a_device_that_is_not_there_is_named_without_torchs_list_of_backends(name, reason):
    with pytest.raises(
        BadSettings, match=rf"^--device '{name}' cannot be used here \({reason}\): take auto, cpu or cuda$"
    ):
        usable_device(name)
