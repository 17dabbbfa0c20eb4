# SPDX-License-Identifier: Apache-2.0
"""Predicts the neurotransmitters of synapses in electron microscopy, with JAX."""

from importlib import metadata

__version__ = metadata.version("synister_jax")
