# SPDX-License-Identifier: Apache-2.0
"""Neurotransmitters of synapses from electron microscopy, on JAX."""

from importlib import metadata

__version__ = metadata.version("synister_jax")
