"""A process of the simulation: python -m tests.simulated_cuda.process GROUP SHIM PLANS FOLDER RESULT."""

import gc
import json
import sys
from pathlib import Path

from tests.simulated_cuda.device.shim import load_shim

if __name__ == "__main__":
    group, shim, plans, folder, result = sys.argv[1:]
    load_shim(Path(shim))
    from tests.simulated_cuda.runs.groups import run_group
    from tests.simulated_cuda.runs.rows import Planned

    # Collecting garbage would walk all objects of the libraries again and again.
    gc.collect()
    gc.freeze()
    planned = {name: Planned(**plan) for name, plan in json.loads(Path(plans).read_text()).items()}
    Path(result).write_text(json.dumps(run_group(group, planned, Path(folder)), indent=1))
