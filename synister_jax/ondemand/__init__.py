# SPDX-License-Identifier: Apache-2.0
"""Answers to requests: the questions, the sources of synapses, and the answers."""
