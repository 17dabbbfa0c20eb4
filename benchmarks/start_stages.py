# SPDX-License-Identifier: Apache-2.0
"""synister_jax.predict, noting when it gets where; for bench_start.py.

    python benchmarks/start_stages.py STARTED --workdir=RUN …

STARTED is the time when this process was started, in seconds since 1970; all other
arguments are predict's. The last line of its output is JSON: the seconds from then to
each moment, and within them those that JAX took to trace, lower and compile.
"""

import json
import sys
import time
from typing import Any

from jax import monitoring

from synister_jax import predict
from synister_jax.bulk import planning, unit_results
from synister_jax.network import checkpoint, inference

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile_or_load",
}


def main() -> None:
    started = float(sys.argv.pop(1))
    noted = {"imported": time.time() - started}
    compiling = dict.fromkeys(_EVENTS.values(), 0.0)

    def add(event: str, seconds: float, **about: object) -> None:
        if event in _EVENTS:
            compiling[_EVENTS[event]] += seconds

    def note(where: Any, name: str, before: str, after: str) -> None:
        """The first call of the function is between these two moments."""
        original = getattr(where, name)

        def noting(*arguments: Any, **named: Any) -> Any:
            noted.setdefault(before, time.time() - started)
            result = original(*arguments, **named)
            noted.setdefault(after, time.time() - started)
            return result

        setattr(where, name, noting)

    monitoring.register_event_duration_secs_listener(add)
    note(checkpoint, "load_variables", "restore_begins", "restored")
    note(planning, "make", "plan_begins", "planned")
    note(inference.Classifier, "start", "first_batch_begins", "first_batch_started")
    note(unit_results, "write", "first_batch_computed", "first_prediction")
    try:
        predict.main()
    except SystemExit as end:
        if end.code:
            raise
    noted["end"] = time.time() - started
    print(json.dumps(noted | {"within": compiling}))


if __name__ == "__main__":
    main()
