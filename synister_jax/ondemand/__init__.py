# SPDX-License-Identifier: Apache-2.0
"""Reads requests, gets synapses from the sources, and writes the predictions."""
