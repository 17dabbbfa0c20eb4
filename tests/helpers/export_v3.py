# SPDX-License-Identifier: Apache-2.0
"""A small JSON export v3."""

import json
import pathlib


def write_export(folder: pathlib.Path, **change: dict) -> None:
    export = {
        "hemi_lineages_v3": {
            "1": {"nt_guess": None, "hemi_lineage_name": "ALad1"},
            "2": {"nt_guess": None, "hemi_lineage_name": "NONE"},
        },
        "skeletons_v3": {
            "16": {"hemi_lineage_id": 1, "nt_known": ["acetylcholine"]},
            "27": {"hemi_lineage_id": 2, "nt_known": None},
            "30": {"hemi_lineage_id": 1, "nt_known": ["gaba", "octopamine"]},
        },
        "synapses_v3": {
            "9": {"skeleton_id": 16, "x": 400, "y": 80, "z": 40, "brain_region": "AL"}
            | {"splits": {"skeleton": "train", "brain_region": "test"}},
            "3": {"skeleton_id": 27, "x": 1, "y": 2, "z": 3, "brain_region": None}
            | {"splits": None},
            "8": {"skeleton_id": 30, "x": 7, "y": 8, "z": 9, "brain_region": "MB"}
            | {"splits": {"skeleton": "validation"}},
        },
    } | change
    for name, content in export.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
