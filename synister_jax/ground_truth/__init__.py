# SPDX-License-Identifier: Apache-2.0
"""Imports published labels of synapses, and splits them into three parts."""
