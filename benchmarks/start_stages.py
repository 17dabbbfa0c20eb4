# SPDX-License-Identifier: Apache-2.0
"""Runs synister_jax.predict and notes when it reaches each stage.

    python -m benchmarks.start_stages STARTED --workdir=RUN …

bench_start.py starts this program. STARTED is the time of its start, in seconds since
1970. All other arguments are flags of `predict`. The last line of the output is JSON.
It has the seconds from STARTED to each stage. It also has the seconds that JAX took to
trace, lower and compile programs, or to load them from the cache.
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
    "/jax/core/compile/jaxpr_trace_duration": "in_tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "in_lowering",
    "/jax/core/compile/backend_compile_duration": "in_compiling_or_loading",
}


def main() -> None:
    started = float(sys.argv.pop(1))
    noted = {"imported": time.time() - started}
    compiling = dict.fromkeys(_EVENTS.values(), 0.0)

    def add(event: str, seconds: float, **about: object) -> None:
        if event in _EVENTS:
            compiling[_EVENTS[event]] += seconds

    def note(where: Any, name: str, before: str, after: str) -> None:
        """Notes the times before and after the first call of a function."""
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
    print(json.dumps(noted | compiling))


if __name__ == "__main__":
    main()
